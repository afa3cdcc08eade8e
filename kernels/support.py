"""Which formats have a kernel, on which chips, and why others have none. Needs no GPU.

What :func:`unsupported` refuses runs all the same: as specified, in plain torch, slowly.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import chip as chips
from .build import CHIPS, FP8_CHIPS
from .formats.spec import QuantSpec
from .transform_quantize import GROUPS, MAX_BLOCK
from .w4a4_linear.tiles import packed_fits, scales_fit
from .w4a16_linear import tiles as w4a16

NEWEST = CHIPS[-1]
"""For questions about no chip in particular."""


class Product(NamedTuple):
    """The kernel of two elements, from which compute capability on (80: 8.0), or why not."""

    kernel: str | None
    oldest: int = CHIPS[0]
    why: str = ""


FP4 = Product(None, why="{weights} has no kernel yet: FP4 matrix units come with Blackwell")
FLOATS = "activations in 8-bit floats need FP8 matrix units (compute capability 8.9)"
PRODUCTS = {
    # weights, activations
    ("int4", "bf16"): Product("w4a16_linear"),
    ("int4", "int4"): Product("w4a4_linear"),
    ("int4", "int8"): Product("w4a4_linear"),
    ("int4", "e4m3"): Product("w4a4_linear", FP8_CHIPS[0], FLOATS),
    ("e2m1", "e2m1"): FP4,
    ("e2m1", "bf16"): FP4,
}


class Limit(NamedTuple):
    """What no kernel computes, whatever the elements, and why in words."""

    meets: Callable[[QuantSpec], bool]
    why: str


LIMITS = (
    Limit(
        lambda spec: spec.transform.kind == "regular", "regular Hadamard matrices have no kernel"
    ),
    Limit(lambda spec: spec.transform.smooth, "smoothed activations have no kernel"),
    Limit(
        lambda spec: spec.rank > 0 and spec.branch.kind == "beside",
        "a protected branch beside the whole input has no kernel",
    ),
    Limit(
        lambda spec: spec.rank > 0 and spec.branch.bits == 8,
        "8-bit protected branches have no kernel",
    ),
    Limit(
        lambda spec: _rounds(spec) and spec.transform.block > MAX_BLOCK,
        f"Hadamard block {{block}} is larger than {MAX_BLOCK}",
    ),
    Limit(
        lambda spec: _rounds(spec) and (spec.activations.group_size or GROUPS[0]) not in GROUPS,
        f"activation groups of {{group}} fit no kernel; {', '.join(map(str, GROUPS[:-1]))} and "
        f"{GROUPS[-1]} do",
    ),
    Limit(
        lambda spec: (
            _rounds(spec)
            and not (scales_fit(spec.width, *_scales(spec)) and packed_fits(spec.width))
        ),
        "{act_scales} x {weight_scales} scales per {width} columns fit no kernel",
    ),
    Limit(
        lambda spec: not _rounds(spec) and not w4a16.fits(spec.width, _scales(spec)[1]),
        "{weight_scales} weight scales per {width} columns fit no kernel",
    ),
)


def unsupported(
    spec: QuantSpec, chip: int | None, dtype: torch.dtype = torch.bfloat16
) -> str | None:
    """Say why no kernel computes a linear of ``spec``; None if one does.

    chip   compute capability (90: 9.0), or None for what is no NVIDIA GPU
    dtype  of the input
    """
    if (why := chips.why_reference(chip)) or chip is None:
        return why
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} inputs are computed as specified"
    product = PRODUCTS[spec.weights.element, spec.activations.element]
    refused = product.kernel is None or chip < product.oldest
    whys = [product.why] if refused else [limit.why for limit in LIMITS if limit.meets(spec)]
    acts, weights = _scales(spec)
    return next(iter(whys), "").format(
        weights=spec.weights.name.upper(), block=spec.transform.block, width=spec.width,
        group=spec.activations.group, act_scales=acts, weight_scales=weights,
    ) or None  # fmt: skip


def _rounds(spec: QuantSpec) -> bool:
    """Tell whether the input is rounded: ``transform_quantize`` runs, and ``w4a4_linear``."""
    return spec.activations.bits < 16


def _scales(spec: QuantSpec) -> tuple[int, int]:
    """Count scales per row of activations and of weights."""
    grouped = spec.activations.granularity == "group" and _rounds(spec)
    acts = spec.width // spec.act_group_size if grouped else 1
    return acts, spec.width // spec.weight_group_size
