"""GPTQ's columns: one scale per row, and one per row and group."""

from dirotq.kernels.build import Build
from dirotq.kernels.formats.weight import Element
from dirotq.kernels.gptq.kernel import config, sweep

ELEMENTS: tuple[Element, ...] = ("int4", "lm4")


def builds() -> list[Build]:
    """Return the kernel for one scale per row, and for one per row and group, in each element."""
    scales = (("channel", "step_stride", "step_next"), ("group", "step_next", "step_stride"))
    return [_build(element, *strides) for element in ELEMENTS for strides in scales]


def _build(element: Element, name: str, one: str, aligned: str) -> Build:
    """Build the kernel where the stride ``one`` is 1, as launches find it."""
    types = {n: "*fp32" for n in sweep.arg_names if n.startswith("p_")} | {"p_codes": "*i8"}
    return Build.of(
        config(element), types, aligned=("w_stride", "target_stride", aligned), given={one: 1},
        name=f"gptq-sweep-{element}-{name}", tensor_core=False,
    )  # fmt: skip
