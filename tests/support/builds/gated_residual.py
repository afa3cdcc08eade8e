"""Gated residuals, alone and with the next norm."""

from dirotq.kernels.build import CHIPS, Build, Config, by_launch
from dirotq.kernels.gated_residual.kernel import add_config, norm_config


def builds() -> list[Build]:
    """Return both kernels in bf16 and fp16."""
    found = []
    for dtype in ("bf16", "fp16"):
        found.append(_build(dtype, add_config(), CHIPS))
        found += [_build(dtype, norm_config(3072, chips[0]), chips) for chips in by_launch()]
    return found


def _build(dtype: str, config: Config, chips: tuple[int, ...]) -> Build:
    names = config.kernel.arg_names
    types = {n: f"*{dtype}" for n in names if n.startswith("p_")}
    return Build.of(
        config, types | {"p_squares": "*fp32", "eps": "fp32"},
        aligned=[n for n in names if n not in ("T", "blocks", "eps")],
        name=f"{config.kernel.__name__}-{dtype}", chips=chips, tensor_core=False,
    )  # fmt: skip
