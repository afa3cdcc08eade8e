"""Which formats have a kernel, on which chips, and why others have none. Needs no GPU.

What :func:`unsupported` refuses runs all the same: as specified, in plain torch, slowly.
"""

from collections.abc import Iterator
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
    """The kernel of two elements, from which compute capability on (80: 8.0), or why not before."""

    kernel: str
    oldest: int = CHIPS[0]
    why: str = ""


FLOATS = "activations in 8-bit floats need FP8 matrix units (compute capability 8.9)"
PRODUCTS = {
    # weights, activations
    ("int4", "bf16"): Product("w4a16_linear"),
    ("int4", "int4"): Product("w4a4_linear"),
    ("int4", "int8"): Product("w4a4_linear"),
    ("int4", "e4m3"): Product("w4a4_linear", FP8_CHIPS[0], FLOATS),
    ("lm4", "bf16"): Product("w4a16_linear"),
    ("lm4", "int4"): Product("w4a4_linear"),
    ("lm4", "int8"): Product("w4a4_linear"),
    ("lm4", "e4m3"): Product("w4a4_linear", FP8_CHIPS[0], FLOATS),
    ("e2m1", "e2m1"): Product("fp4_linear"),
    ("e2m1", "bf16"): Product("fp4_linear"),
}


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
    product = PRODUCTS.get((spec.weights.element, spec.activations.element))
    if product is None:  # every other pair that a spec allows is in the table
        return "leading bits of 8-bit integers have no kernel"
    if chip < product.oldest:
        return product.why
    return next(_limits(spec), None)


def _limits(spec: QuantSpec) -> Iterator[str]:
    """Yield what of a linear no kernel computes, whatever the elements."""
    group, grouped = spec.activations.group, spec.activations.granularity == "group"
    width, weight_scales = spec.width, spec.width // spec.weight_group_size
    if spec.transform.kind == "regular":
        yield "regular Hadamard matrices have no kernel"
    if spec.transform.smooth:
        yield "smoothed activations have no kernel"
    if spec.rank > 0 and spec.branch.kind == "beside":
        yield "a protected branch beside the whole input has no kernel"
    if spec.rank > 0 and spec.branch.bits == 8:
        yield "8-bit protected branches have no kernel"
    floats = spec.weights.element == "e2m1"
    if spec.activations.bits == 16:  # the input is not rounded
        if not floats and not w4a16.fits(width, weight_scales):
            yield f"{weight_scales} weight scales per {width} columns fit no kernel"
        return
    if spec.transform.block > MAX_BLOCK:
        yield f"Hadamard block {spec.transform.block} is larger than {MAX_BLOCK}"
    if floats:  # whose groups fill the width
        return
    if (spec.activations.group_size or GROUPS[0]) not in GROUPS:
        sizes = f"{', '.join(map(str, GROUPS[:-1]))} and {GROUPS[-1]}"
        yield f"activation groups of {group} fit no kernel; {sizes} do"
    act_scales = width // spec.act_group_size if grouped else 1
    if not (scales_fit(width, act_scales, weight_scales) and packed_fits(width)):
        yield f"{act_scales} x {weight_scales} scales per {width} columns fit no kernel"
