"""A packed linear: its algorithm, and the same by the kernels of a plan.

Letters: M rows, D channels, N outputs, R low-rank directions, G groups.
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from .buffers import Codes, Fp4Codes, Packed, Repacked, Unpacked
from .chip import say_once
from .formats.protected import dequantize_protected, rounded_coefficients
from .formats.spec import QuantSpec
from .fp4_linear import tiles as fp4_tiles
from .plan import Plan
from .prologue import Prologue, plain
from .side_stream import beside, fork
from .transform_quantize import quantize_rows, transform
from .w4a4_linear import tiles as w4a4_tiles
from .w4a4_linear import w4a4_linear
from .w4a16_linear import tiles as w4a16_tiles
from .w4a16_linear import w4a16_linear


def reference(x_MD: Tensor, packed: Packed, spec: QuantSpec) -> Tensor:
    """Return y [M, N] in x's dtype by the specification: any device, any floating dtype."""
    z, c = transform(x_MD, packed.basis, packed.rotation, spec, packed.smooth)
    wp = packed.wp
    if c is not None and wp is not None and packed.wpscale is not None:
        c, wp = rounded_coefficients(c), dequantize_protected(wp, packed.wpscale)
    weights, element = (packed.qweight, packed.wscale), spec.weights.element
    if spec.activations.bits < 16:
        codes, scale = quantize_rows(z, spec)
        y = w4a4_linear(codes, scale, c, *weights, wp, packed.bias, packed.wglobal, element)
    else:
        y = w4a16_linear(z, *weights, packed.bias, packed.wglobal, element)
        if c is not None and wp is not None:
            y = y + c.float() @ wp.float().mT
    return y.to(x_MD.dtype)


def added(y_MN: Tensor, x_MD: Tensor, down_Dr: Tensor, up_Nr: Tensor) -> Tensor:
    """Return y + (x A^T) B^T in x's dtype: updates that no kernel takes, or none runs for."""
    return torch.addmm(y_MN, x_MD @ down_Dr.to(x_MD.dtype), up_Nr.to(x_MD.dtype).mT)


def linear(
    plan: Plan, x: Tensor | Prologue, packed: Packed, spec: QuantSpec, last: int = 0
) -> Tensor:
    """Return y [M, N] of rows [M, D], or of a prologue of so many rows, by a plan's kernels.

    last  directions at the end of the branch that stay in the main branch's input

    The transform mostly waits for memory; unpacking the weights beside it fills some of the gaps.
    """
    if plan.engine == "reference" or spec.activations.bits == 16:
        x_MD = x.value().flatten(0, 1) if isinstance(x, Prologue) else x
        if plan.engine != "reference":
            return sixteen_bits(plan, x_MD, packed, spec, last)
        # On a GPU somebody expected speed; on a CPU it is the way that it works.
        level = logging.WARNING if x_MD.is_cuda else logging.INFO
        say_once(f"packed linears run on the torch reference path: {plan.why}", level)
        if not last or packed.basis is None or packed.wp is None:
            return reference(x_MD, packed, spec)
        own = packed.without(last)
        y = reference(x_MD, own, replace(spec, rank=own.rank))
        return added(y, x_MD, packed.basis[:, own.rank :], packed.wp[:, own.rank :])
    prologue = x if isinstance(x, Prologue) else plain(x[None])
    with torch.cuda.device_of(prologue.x_BTD):
        if plan.engine in ("packed", "fp4"):
            codes, weights = quantize(plan, prologue, packed, spec, last), None
        else:
            weights = allocate(plan, packed)
            products = prologue.rows * prologue.channels * len(packed.qweight)
            start = fork(prologue.x_BTD.device, products)
            codes = quantize(plan, prologue, packed, spec, last)
            with beside(start):
                unpack(plan, packed, weights)
        return multiply(plan, codes, packed, weights, spec, prologue.x_BTD.dtype)


def quantize(
    plan: Plan, x: Prologue, packed: Packed, spec: QuantSpec, last: int = 0
) -> Codes | Fp4Codes:
    """Return codes, scales and, but for ``scaled_mm``, c of x, as the plan's product wants them."""
    if plan.engine == "fp4":
        from .transform_quantize.fp4 import launch as round_to_fp4

        return round_to_fp4(x, packed.basis, packed.rotation, spec, beside=last)
    from .transform_quantize.kernel import launch

    appended = plan.appended
    return launch(
        x, packed.basis, packed.rotation, spec, container=plan.dtype, appended=appended,
        bias=appended and packed.bias is not None, beside=last,
    )  # fmt: skip


def allocate(plan: Plan, packed: Packed) -> Unpacked | Repacked:
    """Allocate scratch for the weights of a plan that doesn't read them as they are."""
    if plan.engine == "humming":
        from .humming_linear.kernel import allocate as for_humming

        return for_humming(packed)
    from .unpack_w4.kernel import allocate as for_codes

    return for_codes(packed, plan.dtype, appended=plan.appended)


def unpack(plan: Plan, packed: Packed, out: Unpacked | Repacked) -> None:
    """Fill what :func:`allocate` returned."""
    if isinstance(out, Repacked):
        from .humming_linear.kernel import launch as repack

        repack(packed, out)
    else:
        from .unpack_w4.kernel import launch

        launch(packed, plan.dtype, appended=plan.appended, out=out)


def multiply(
    plan: Plan,
    codes: Codes | Fp4Codes,
    packed: Packed,
    weights: Unpacked | Repacked | None,
    spec: QuantSpec,
    dtype: torch.dtype,
) -> Tensor:
    """Return y [M, N] in ``dtype``; ``weights`` are :func:`unpack`'s, None: the packed are read."""
    if isinstance(codes, Fp4Codes):
        from .fp4_linear.kernel import launch as launch_fp4

        assert isinstance(plan.tile, fp4_tiles.Tile)
        return launch_fp4(codes, packed, width=spec.width, out_dtype=dtype, tile=plan.tile)
    if isinstance(weights, Repacked):
        from .humming_linear.library import multiply as by_humming

        return by_humming(codes, weights, packed.wp)
    if plan.appended:
        assert weights is not None and weights.scale is not None
        return torch._scaled_mm(
            codes.codes, weights.weights.t(), scale_a=codes.scale, scale_b=weights.scale,
            out_dtype=dtype, use_fast_accum=True,
        )  # fmt: skip
    from .w4a4_linear.kernel import launch

    assert isinstance(plan.tile, w4a4_tiles.Tile)
    return launch(
        codes, packed, None if weights is None else weights.weights,
        width=spec.width, out_dtype=dtype, tile=plan.tile,
    )  # fmt: skip


def sixteen_bits(
    plan: Plan, x_MD: Tensor, packed: Packed, spec: QuantSpec, last: int = 0
) -> Tensor:
    """Return y [M, N] of activations that stay as they are."""
    with torch.cuda.device_of(x_MD):
        z, c = transform(x_MD, packed.basis, packed.rotation, spec, beside=last)
        if isinstance(plan.tile, fp4_tiles.Tile):
            from .fp4_linear.kernel import launch as launch_fp4

            y = launch_fp4(z, packed, width=spec.width, out_dtype=z.dtype, tile=plan.tile)
        else:
            from .w4a16_linear.kernel import launch

            assert isinstance(plan.tile, w4a16_tiles.Tile)
            y = launch(z, packed, tile=plan.tile)
        return y if c is None or packed.wp is None else y.addmm_(c, packed.wp.to(c.dtype).mT)
