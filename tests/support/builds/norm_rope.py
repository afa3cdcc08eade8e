"""Norms and rotary embedding of every family: pairs, tables and heads, and either step alone."""

from typing import Any

from dirotq.kernels.build import FP8_CHIPS, Build, Config, by_launch
from dirotq.kernels.norm_rope.into_fp8 import codes_config, norm_rope_codes
from dirotq.kernels.norm_rope.kernel import norm_config, norm_rope

FLUX = {"norm": True, "rope": True, "weight": 128, "table": 128, "interleaved": True}
KINDS = {
    "flux": FLUX,
    "complex": FLUX | {"table": 64},
    "halves": FLUX | {"interleaved": False},
    "halves-pairs": FLUX | {"interleaved": False, "table": 64},
    "no-weight": FLUX | {"weight": 0},
    "norm": FLUX | {"rope": False},
    "rope": FLUX | {"norm": False, "weight": 0},
    "wan": FLUX | {"weight": 40 * 128, "table": 64},
}
"""By heads of 128 channels, 24 of them, of Wan 40."""
CODES = {"rope": True, "weight": 128, "other": False, "table": 128, "interleaved": True}
CODES_KINDS = {
    "flux": CODES,
    "flux-double": CODES | {"other": True},
    "complex": CODES | {"table": 64},
    "complex-double": CODES | {"table": 64, "other": True},
    "halves": CODES | {"interleaved": False},
    "no-weight": CODES | {"weight": 0},
    "norm": CODES | {"rope": False},
    "norm-double": CODES | {"rope": False, "other": True},
    "wan": CODES | {"weight": 40 * 128, "table": 64},
}
"""Of kinds, those in FP8."""
WIDTHS = {32: 24, 64: 24, 72: 16, 256: 8, 2048: 1}


def builds() -> list[Build]:
    """Return every kind in bf16, FLUX's in fp16, other heads."""
    found = [(f"bf16-{name}", "bf16", 128, 24, kind) for name, kind in KINDS.items()]
    found += [("fp16-flux", "fp16", 128, 24, FLUX)]
    found += [
        (f"bf16-d{dim}", "bf16", dim, heads, FLUX | {"weight": dim, "table": dim})
        for dim, heads in WIDTHS.items()
    ]
    codes = [(f"fp8-{name}", 128, 24, kind) for name, kind in CODES_KINDS.items()]
    codes += [
        (f"fp8-d{dim}", dim, 24, CODES | {"weight": dim, "table": dim}) for dim in (32, 64, 96)
    ]
    return [_build(*one, chips) for one in found for chips in by_launch()] + [
        _codes(*one, chips) for one in codes for chips in by_launch(FP8_CHIPS)
    ]


def _build(
    name: str, kind: str, dim: int, heads: int, options: dict[str, Any], chips: tuple[int, ...]
) -> Build:
    heads = options["weight"] // dim if options["weight"] > dim else heads
    config = norm_config(dim, heads, chips[0], **options)
    types = {n: f"*{kind}" for n in norm_rope.arg_names if n.startswith("p_")}
    return _of(config, types, options["table"] < dim, f"norm_rope-{name}", chips, dot=False)


def _codes(
    name: str, dim: int, heads: int, options: dict[str, Any], chips: tuple[int, ...]
) -> Build:
    heads = options["weight"] // dim if options["weight"] > dim else heads
    config = codes_config(dim, heads, chips[0], **options)
    types = {n: "*bf16" for n in norm_rope_codes.arg_names if n.startswith("p_")}
    types |= {"p_codes": "*fp8e4nv", "p_scales": "*fp32"}
    return _of(config, types, options["table"] < dim, f"norm_rope-{name}", chips, dot=True)


def _of(
    config: Config, types: dict[str, str], pairs: bool, name: str, chips: tuple[int, ...], dot: bool
) -> Build:
    # Tables are real and imaginary numbers of one tensor where they have one number a pair.
    return Build.of(
        config, types | {"p_cos": "*fp32", "p_sin": "*fp32", "eps": "fp32"},
        aligned=[f"{t}_{axis}" for t in ("x", "out", "table") for axis in ("batch", "token")]
        + ["x_head"],
        given={} if pairs else {"channel": 1}, name=name, chips=chips, tensor_core=dot,
    )  # fmt: skip
