"""GPTQ's columns: one scale per row, and one per row and group."""

from dirotq.kernels.build import Build
from dirotq.kernels.gptq.kernel import config, sweep


def builds() -> list[Build]:
    """Return the kernel for one scale per row, and for one per row and group."""
    return [
        _build("channel", "step_stride", "step_next"),
        _build("group", "step_next", "step_stride"),
    ]


def _build(name: str, one: str, aligned: str) -> Build:
    """Build the kernel where the stride ``one`` is 1, as launches find it."""
    types = {n: "*fp32" for n in sweep.arg_names if n.startswith("p_")} | {"p_codes": "*i8"}
    return Build.of(
        config(), types, aligned=("w_stride", "target_stride", aligned), given={one: 1},
        name=f"gptq-sweep-{name}", tensor_core=False,
    )  # fmt: skip
