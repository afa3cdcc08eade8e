"""What a model's pipelines will take of a GPU, from shapes alone: before anything is downloaded.

``work`` is of dirotq/quantize/workload.py, ``width`` the bytes of a number that is not packed.
"""

from typing import Any

from dirotq.kernels.linear import QuantLinear
from dirotq.models.decoding import bytes_of, decoding
from dirotq.packed.swap import footprint
from dirotq.quantize.running import ALIVE, Running


def original(work: Any, batch: int = 1, width: int = 2) -> Running:
    """Return what the 16-bit pipeline takes, ``batch`` prompts a call."""
    numbers = {
        name: sum(p.numel() for p in one.parameters()) for name, one in work.denoisers.items()
    }
    weights = {name: width * n for name, n in (work.component_numbers | numbers).items()}
    return _running(work, weights, work.denoisers, batch, width)


def packed(work: Any, batch: int = 1, width: int = 2) -> Running:
    """Return what the packed pipeline will take, ``batch`` prompts a call."""
    weights = {name: width * n for name, n in work.component_numbers.items()} | work.encoders
    for name, one in work.packed_denoisers.items():
        size = footprint(one)
        weights[name] = size["codes"] + (sum(size.values()) - size["codes"]) * width // 2
    return _running(work, weights, work.packed_denoisers, batch, width)


def activations(work: Any, samples: int, width: int) -> float:
    """Count the bytes alive within a block."""
    largest = max(work.tokens(s) * (s.in_features + sum(s.out_features)) for s in work.block_sites)
    return ALIVE * samples * width * largest


def decoded(work: Any, batch: int, width: int) -> float:
    """Count the bytes alive within the decoder of images or videos."""
    stored = bytes_of(work.autoencoder)  # in a pipeline of 16 bits: 4 where it needs float32
    numbers = decoding(work.autoencoder, *work.size)["decoding"] / stored
    return float(batch * max(width, stored) * numbers)


def _running(
    work: Any, weights: dict[str, int], denoisers: dict[str, Any], batch: int, width: int
) -> Running:
    layers = {n: width * max(sizes.values()) for n, sizes in work.component_layers.items()}
    layers |= {n: max(_own(m, width) for m in one.modules()) for n, one in denoisers.items()}
    tiled = decoding(work.autoencoder, *work.size)["tiled"]
    return Running(
        weights=weights,
        # A packed encoder's layers are smaller, and count as they were.
        layers={name: min(layers.get(name, size), size) for name, size in weights.items()},
        denoising=activations(work, batch * work.doubled, width),
        decoding=decoded(work, batch, width),
        tiled=tiled and tiled * batch,
    )


def _own(module: Any, width: int) -> int:
    """Count the bytes of a module's own parameters; packed ones are wider with ``width``."""
    stored = isinstance(module, QuantLinear)
    return sum(
        t.numel() * (t.element_size() * width // 2 if stored else width)
        for t in module.parameters(recurse=False)
    )
