"""A QuantSpec with everything filled in, to be varied field by field."""

from typing import Any

from dirotq.kernels.formats.spec import QuantSpec

DEFAULTS: dict[str, Any] = {
    "dim": 64,
    "rows": (48,),
    "rank": 0,
    "transform": "hadamard",
    "block": 1,
    "weight_bits": 4,
    "weight_scale": "channel",
    "weight_group": 16,
    "act_bits": 4,
    "act_scale": "token",
    "act_group": 16,
}


FP4 = {
    name: {"weight_scale": name, "act_scale": name, "weight_group": group, "act_group": group}
    for name, group in (("nvfp4", 16), ("mxfp4", 32))
}
"""Fields of the two FP4 formats."""


def tiny_spec(**changes: Any) -> QuantSpec:
    """W4A4, 64 -> 48, one scale per row, no transform, nothing protected; but for ``changes``."""
    return QuantSpec.from_dict(DEFAULTS | changes)
