"""`python benchmarks/lora.py`: what a LoRA on every packed linear of FLUX.1 costs (needs a GPU).

usage: python benchmarks/lora.py [--rank 32] [--side 1024]

Weights and adapters are random. Milliseconds are of one forward, as `make bench-flux` takes them.
With separate A's q, k and v have one each, as most LoRAs do; with shared ones they have one.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from dirotq.benchmarks.contestants import random_packed
from dirotq.benchmarks.forward_timing import timed
from dirotq.benchmarks.model_inputs import Case, inputs
from dirotq.kernels.linear import QuantLinear, rows_of
from dirotq.packed.guards import guard
from dirotq.runtime.accelerate import accelerate

TURNS = 20
"""How often ``set_adapters`` is timed."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--side", type=int, default=1024)
    options = parser.parse_args(arguments)
    for needed, there in (("a CUDA GPU", torch.cuda.is_available()), ("peft", find_spec("peft"))):
        if not there:
            print(f"benchmarks/lora.py needs {needed}, and finds none", file=sys.stderr)
            return 1
    case = Case("flux", options.side)
    transformer = accelerate(random_packed("flux"), compile=True, graphs=True)
    guard(transformer)
    given = inputs(case, transformer.config)
    without = timed(transformer, given)
    print(f"FLUX.1 {case}: {without.ms.p50:.1f} ms without a LoRA", flush=True)
    add(transformer, options.rank)
    for kind in ("separate A's", "shared A's"):
        if kind == "shared A's":
            share(transformer)
        forward = timed(transformer, given)
        more = 100 * (forward.ms.p50 / without.ms.p50 - 1)
        print(
            f"rank {options.rank}, {kind}: {forward.ms.p50:.1f} ms, {more:+.1f} %, first call "
            f"{forward.first_s:.1f} s, {directions(transformer)}",
            flush=True,
        )
    before = compilations()
    times = list(settings(transformer, given))
    print(
        f"set_adapters: {statistics.median(times):.1f} ms, at most {max(times):.1f} ms, "
        f"{compilations() - before} compilations"
    )
    return 0


def add(transformer: Any, rank: int) -> None:
    """Put random bfloat16 adapters on every packed linear, as strong as trained ones."""
    from peft import LoraConfig

    views = {id(rows_of(m)[0]) for m in transformer.modules() if hasattr(m, "output_rows")}
    names = [
        name
        for name, module in transformer.named_modules()
        if hasattr(module, "output_rows")
        or (isinstance(module, QuantLinear) and id(module) not in views)
    ]
    config = LoraConfig(r=rank, target_modules=names, init_lora_weights=False)
    transformer.add_adapter(config, "one")
    for layer in layers(transformer):
        for half, size in ((layer.lora_A, 1.0), (layer.lora_B, 0.02)):
            weight = half["one"].weight
            weight.data = (torch.randn_like(weight) * size * weight.shape[1] ** -0.5).bfloat16()


def share(transformer: Any) -> None:
    """Give the linears of a site one A."""
    first: dict[int, Any] = {}
    for layer in layers(transformer):
        down = layer.lora_A["one"].weight
        site = id(rows_of(layer.get_base_layer())[0])
        with torch.no_grad():
            down.copy_(first.setdefault(site, down))


def layers(transformer: Any) -> list[Any]:
    return [m for m in transformer.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def settings(transformer: Any, given: dict[str, Any]) -> Iterator[float]:
    """Time ``set_adapters`` with another weight, in milliseconds, and call once after each."""
    for turn in range(TURNS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        transformer.set_adapters(["one"], [0.5 + turn / TURNS])
        torch.cuda.synchronize()
        yield 1e3 * (time.perf_counter() - began)
        if turn < 2:
            with torch.no_grad():
                transformer(**given)


def directions(transformer: Any) -> str:
    """Tell how many directions sites have beside their own."""
    counts, apart = [], 0
    for module in transformer.modules():
        made = module.updates.made if isinstance(module, QuantLinear) and module.updates else None
        if made is not None:
            wide = made.down.dtype == torch.bfloat16
            counts.append(made.down.shape[1] - (module.spec.rank if wide else 0))
            apart += not wide
    return f"{min(counts)} to {max(counts)} directions, {apart} of {len(counts)} sites apart"


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    sys.exit(main())
