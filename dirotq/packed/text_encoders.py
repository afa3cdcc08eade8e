"""Text encoders with rounded weights, in the folder that holds the packed transformer.

Weights alone are rounded: a text encoder runs once per image. What it computes stays in 16 bits,
and padding and masks are none of its weights. ADR 46 says why by our own linear.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dirotq.files.json_file import INDEX, components, read_json
from dirotq.kernels.weight_only import Bits
from dirotq.quiet import heed, quiet
from dirotq.sources.components import class_named

log = logging.getLogger(__name__)

Width = Literal["keep", "w8", "w4"]
BITS: Mapping[str, Bits] = {"w8": 8, "w4": 4}
PREFIX = "text_encoder"


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one text encoder: its ``bits`` and ``size``, or ``why`` it stays as it is.

    ``linears``  paths of those that are packed, with the channels of each
    ``kept``  why the embeddings of its tokens stay in 16 bits, or ""
    """

    cls: Any
    bits: Bits | None = None
    size: int = 0
    why: str = ""
    linears: Mapping[str, int] = field(default_factory=dict)
    kept: str = ""


def choose(source: Path, width: str) -> dict[str, Choice]:
    """Return what becomes of each text encoder of the pipeline in ``source``, by its name.

    Nothing with ``keep``. A class that can't be packed is kept, and the log says why.
    """
    if width not in BITS:
        return {}
    found = {}
    for name, (library, cls_name) in components(read_json(source / INDEX)).items():
        if not name.startswith(PREFIX):
            continue
        cls = class_named(library, cls_name)
        found[name] = choice = _chosen(cls, source / name, BITS[width])
        if choice.why:
            log.warning("the %s (%s) stays in 16 bits: %s", name, cls_name, choice.why)
        elif choice.kept:
            log.warning(
                "embeddings of the %s (%s) stay in 16 bits: %s", name, cls_name, choice.kept
            )
    return found


def write_packed(
    part: Path,
    target: Path,
    choice: Choice,
    shard: str | int,
    codes: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> int:
    """Write the text encoder in ``part`` with rounded weights to ``target``; return its bytes.

    codes  ``weight`` and ``scale`` of linears that are calibrated, by their paths; others are
           rounded to nearest

    transformers reads and rounds one weight after the other: no more than the packed encoder and
    one weight is in memory, beside ``codes``.
    """
    from dirotq.packed.text_quantizer import TextEncoderConfig  # slow: transformers' models

    with quiet() as said:
        encoder = choice.cls.from_pretrained(
            part,
            quantization_config=TextEncoderConfig(bits=choice.bits, codes=codes),
            dtype=torch.bfloat16,
            use_safetensors=True,
            local_files_only=True,
        )
        encoder.save_pretrained(target, max_shard_size=shard)
    heed(said)
    return sum(file.stat().st_size for file in target.glob("*.safetensors"))


def packed_encoders(folder: Path) -> list[str]:
    """Return the names of a pipeline's text encoders that DiRotQ packed."""
    return [name for name in components(read_json(folder / INDEX)) if packed_bits(folder / name)]


def load_encoders(folder: Path, names: Iterable[str], dtype: torch.dtype) -> dict[str, Any]:
    """Return packed text encoders of a pipeline's folder, in host memory."""
    index, found = components(read_json(folder / INDEX)), {}
    with quiet() as said:
        for name in names:
            cls = class_named(*index[name])
            found[name] = cls.from_pretrained(
                folder / name, dtype=dtype, use_safetensors=True, local_files_only=True
            )
    heed(said)
    return found


def packed_bits(part: Path) -> Bits | None:
    """Return the bits of a packed text encoder's weights; None for any other component."""
    config = part / "config.json"
    if not part.name.startswith(PREFIX) or not config.is_file():
        return None
    packing = read_json(config).get("quantization_config")
    if not isinstance(packing, dict) or packing.get("quant_method") != "dirotq":
        return None
    return next((bits for bits in BITS.values() if packing.get("bits") == bits), None)


def _chosen(cls: Any, part: Path, bits: Bits) -> Choice:
    if cls is None or not hasattr(cls, "config_class"):
        return Choice(cls, why="it is no model of transformers")
    if "quantization_config" in read_json(part / "config.json"):
        return Choice(cls, why="it is quantized already")
    from dirotq.packed.text_quantizer import packable, put_weight_only, token_embeddings

    try:
        with quiet(), torch.device("meta"):
            empty = cls(cls.config_class.from_pretrained(part, local_files_only=True))
        linears = packable(empty, bits)
        embeddings, kept = token_embeddings(empty)
    except Exception as error:  # noqa: BLE001  any line of a foreign class
        why = f"it can't be built without weights ({type(error).__name__}: {error})"
        return Choice(cls, why=why)
    if not linears:
        why = f"it has no linears in repeated blocks that take {bits}-bit weights"
        return Choice(cls, why=why)
    channels = {name: empty.get_submodule(name).in_features for name in linears}
    put_weight_only(empty, bits, linears, embeddings, "lm4")
    for name in embeddings[1:]:  # which share the first one's codes and scales, once loaded
        empty.set_submodule(name, torch.nn.Identity())
    size = sum(t.numel() * (1 if t.dtype == torch.int8 else 2) for t in empty.parameters())
    return Choice(cls, bits, size, linears=channels, kept=kept)
