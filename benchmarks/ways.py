"""The ways in which a transformer of full size is run: what is made, and what is done to it.

A way may be undone, so that the next one runs the same weights; else they are made anew.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

import dirotq
from dirotq.benchmarks import contestants as made
from dirotq.benchmarks.forward_rows import ATTENTION, COMPILED, EAGER, FP8, FUSED, UNFUSED, W4A8
from dirotq.benchmarks.model_inputs import Case
from dirotq.runtime.accelerate import Runtime

PACKED = "packed"
PACKED_INTEGERS = "packed, integers"
PACKED_ATTENTION = "packed, FP8 attention"
NO_GRAPHS = "packed, no graph"
PLAIN = "packed, no compiler, no graph"
ADAPTED = "packed, adapter"
OFFLOADED = "packed, group offloading"
EAGER_ADAPTED = "bf16 eager, adapter"
EAGER_OFFLOADED = "bf16 eager, group offloading"

BF16 = "bf16"
ADAPTER_RANK = 16
Undo = Callable[[], object]
Apply = Callable[[Any, Case], Undo | None]
"""Changes a transformer in place. What it returns undoes that; None: it can't be undone."""


@dataclass(frozen=True, slots=True)
class Way:
    """``base``: bf16, or the method (conf/method) by which weights are packed, and overrides."""

    base: str
    apply: Apply

    @property
    def packed(self) -> bool:
        return self.base != BF16


def as_made(transformer: Any, case: Case) -> Undo:
    """Leave it as diffusers gives it."""
    return lambda: None


def compiled(transformer: Any, case: Case) -> Undo:
    """Compile each repeated block."""
    made.compile_blocks(transformer)
    return lambda: made.uncompiled(transformer)


def fp8(transformer: Any, case: Case) -> None:
    """Put the linears of blocks into FP8, and compile the blocks."""
    made.compile_blocks(made.fp8_blocks(transformer))


def accelerated(**changes: Any) -> Apply:
    """Return what runs a packed transformer by the runtime's defaults, but for ``changes``."""

    def apply(transformer: Any, case: Case) -> Undo:
        dirotq.accelerate(transformer, **{f.name: f.default for f in fields(Runtime)} | changes)
        return lambda: dirotq.accelerate(transformer, **SLOW)

    return apply


class Adapted(nn.Module):
    """A linear and what an adapter adds to it: base(x) + x A B."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, device: torch.device) -> None:
        super().__init__()
        self.base = base
        made = {"device": device, "dtype": torch.bfloat16}
        self.register_buffer("a", torch.randn(inputs, ADAPTER_RANK, **made) * inputs**-0.5)
        self.register_buffer("b", torch.randn(ADAPTER_RANK, outputs, **made) * 0.01)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.a) @ self.b


def adapted(before: Apply) -> Apply:
    """Return ``before`` with an adapter put around every linear that is packed, as PEFT does it."""

    def apply(transformer: Any, case: Case) -> Undo | None:
        undo = before(transformer, case)
        device = next(transformer.parameters()).device
        bases = {}
        for name, (inputs, outputs) in made.linears_in_blocks(case.model, case.changes).items():
            bases[name] = transformer.get_submodule(name)
            transformer.set_submodule(name, Adapted(bases[name], inputs, outputs, device))

        def back() -> None:
            for name, base in bases.items():
                transformer.set_submodule(name, base)
            if undo is not None:
                undo()

        return back if undo is not None else None

    return apply


def offloaded(before: Apply) -> Apply:
    """Return ``before`` with weights in host memory, brought in block by block on a stream."""

    def apply(transformer: Any, case: Case) -> None:
        before(transformer, case)
        device = next(transformer.parameters()).device
        transformer.enable_group_offload(
            onload_device=device, offload_device=torch.device("cpu"), offload_type="block_level",
            num_blocks_per_group=1, use_stream=device.type == "cuda",
        )  # fmt: skip

    return apply


COMPILE = "compile"
"""The runtime's field for the compiler's part."""
SLOW = {COMPILE: False, "graphs": False}
DEFAULT = accelerated()
WAYS: Mapping[str, Way] = {
    PACKED: Way("dirotq", DEFAULT),
    PACKED_INTEGERS: Way("dirotq weight_format=int4_channel", DEFAULT),
    PACKED_ATTENTION: Way("dirotq", accelerated(attention="fp8")),
    NO_GRAPHS: Way("dirotq", accelerated(graphs=False)),
    PLAIN: Way("dirotq", accelerated(**SLOW)),
    ADAPTED: Way("dirotq", adapted(DEFAULT)),
    OFFLOADED: Way("dirotq", offloaded(DEFAULT)),
    EAGER: Way(BF16, as_made),
    EAGER_ADAPTED: Way(BF16, adapted(as_made)),
    COMPILED: Way(BF16, compiled),
    FP8: Way(BF16, fp8),
    EAGER_OFFLOADED: Way(BF16, offloaded(as_made)),
    # `make bench-flux` has names of its own.
    FUSED: Way("dirotq", DEFAULT),
    UNFUSED: Way("dirotq", accelerated(**SLOW)),
    ATTENTION: Way("dirotq", accelerated(attention="fp8")),
    W4A8: Way("dirotq_w4a8", DEFAULT),
}
"""By contestant; those of one base follow one another."""
