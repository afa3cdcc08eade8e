"""Specification of ``transform_quantize`` (docs/method.md M1, M2, M4).

Letters: M rows (tokens), D channels, R protected directions, K main-branch width, G groups.
"""

import torch
from torch import Tensor

from ..appended import TINY
from ..formats import fp4
from ..formats.hadamard import block_hadamard
from ..formats.spec import QuantSpec

POW2_CLIP = 0.9
"""A group takes the smallest power of two >= 0.9 of its share of the row (docs/quality.md)."""

RMS_TOP = 20.0
"""What ``rms`` takes for a row's largest value, in times its root mean square. Larger ones are cut
off; rotated rows have none. 1.25 times a power of two: with it Gaussian groups of 16 lose least."""

LZS_LARGEST = 127
"""Largest of the 8-bit integers that ``lzs`` cuts bits off."""


def transform(
    x_MD: Tensor,
    p_DR: Tensor | None,
    t_DK: Tensor | None,
    spec: QuantSpec,
    smooth_D: Tensor | None = None,
    beside: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Split x into protected coefficients c = xP and the main branch z.

    x_MD      floating, [..., D]
    p_DR      [D, R] in any float dtype, or None at rank 0
    t_DK      [D, K], the dense rotation of the remainder; None unless the transform is ``dense``
    smooth_D  [D], a factor per channel; None unless ``spec.transform.smooth``
    beside    last directions of P that stay in z (kernels/updates.py)
    returns   z [..., K] and c [..., R] (None at rank 0), both in x's dtype:
              z = (x - c Pᵀ) H (M2), z = (x * smooth) H for ``branch="beside"`` (M3),
              z = x T for ``dense`` (M1)
    """
    c_MR = None if p_DR is None else x_MD @ p_DR.to(x_MD.dtype)
    if spec.transform.kind == "dense":
        assert t_DK is not None
        return x_MD @ t_DK.to(x_MD.dtype), c_MR
    if c_MR is not None and spec.branch.kind == "project":
        assert p_DR is not None
        lead = p_DR.shape[1] - beside
        x_MD = x_MD - c_MR[..., :lead] @ p_DR[:, :lead].to(x_MD.dtype).mT
    if spec.transform.smooth:
        assert smooth_D is not None
        x_MD = x_MD * smooth_D.to(x_MD.dtype)
    return block_hadamard(x_MD, spec.transform.block, spec.transform.matrix), c_MR


def quantize_rows(z_MK: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Compute symmetric codes of each row: z = codes * scale, up to rounding.

    z_MK     floating, [M, K]
    returns  codes int8 [M, K] and scale float32 [M, G] (G = 1 but for ``group``):
             ``token``  q in [-qmax, qmax], one scale amax/qmax per row
             ``group``  the same with one scale per ``act_group`` channels
             ``pow2``   q 2^(e+4) with 4-bit q and a power of two e in 0 ... -4 per group: the row
                        scale is amax/7 * 2^-4 and the codes stay exact in INT8 and FP8-E4M3
             ``rms``    ``pow2`` with RMS_TOP times the row's root mean square for amax: known
                        before z is, from x and c, because rotations keep lengths. With 8 bits, the
                        codes are float8_e4m3fn, z over 1/448 of that
             ``lzs``    8-bit integers of amax/127, of which a group keeps the sign and three bits,
                        from the highest that is set in any of them; lower bits are cut off
             ``nvfp4``, ``mxfp4``  E2M1 in halves, one scale per 16 or 32 channels: the float32 that
                        its byte means (``kernels.fp4.steps``), for NVFP4 under one global scale
                        per row, so that rows do not depend on the batch
    """
    acts = spec.activations
    if acts.element == "e2m1":
        return _fp4_rows(z_MK.float(), spec)
    if acts.element == "lzs":
        return _leading_bits(z_MK.float(), spec)
    qmax, unit = acts.largest, 2.0**acts.levels
    z_MK = z_MK.float()
    if acts.shifted or acts.element == "e4m3":
        if acts.statistic == "rms":
            amax_M1 = RMS_TOP * z_MK.square().mean(-1, keepdim=True).sqrt()
        else:
            amax_M1 = z_MK.abs().amax(-1, keepdim=True)
        inverse_M1 = _ratio(torch.full_like(amax_M1, qmax), amax_M1)
        scale_M1 = amax_M1 / qmax / unit
        if acts.element == "e4m3":
            codes = (z_MK * inverse_M1).clamp(-qmax, qmax) * unit
            return codes.to(torch.float8_e4m3fn), scale_M1
        z_MGk = z_MK.unflatten(-1, (-1, spec.act_group_size))
        share_MG1 = _ratio(z_MGk.abs().amax(-1, keepdim=True), amax_M1.unsqueeze(-1)) * POW2_CLIP
        # Smallest e with 2^e >= share, read off the float's exponent: exact, as a kernel does it.
        mantissa, exponent = torch.frexp(share_MG1)
        e_MG1 = torch.where(mantissa > 0.5, exponent, exponent - 1).clamp(-acts.levels, 0)
        power_MG1 = torch.ldexp(torch.ones_like(share_MG1), e_MG1)
        q = (z_MGk * (inverse_M1.unsqueeze(-1) / power_MG1)).round().clamp(-qmax, qmax)
        return (q * power_MG1 * unit).flatten(-2).to(torch.int8), scale_M1
    z_MGk = z_MK.unflatten(-1, (-1, spec.act_group_size))
    amax_MG1 = z_MGk.abs().amax(-1, keepdim=True)
    q = (z_MGk * _ratio(torch.full_like(amax_MG1, qmax), amax_MG1)).round().clamp(-qmax, qmax)
    return q.flatten(-2).to(torch.int8), amax_MG1.squeeze(-1) / qmax


def dequantize_rows(codes_MK: Tensor, scale_MG: Tensor) -> Tensor:
    """Return float32 [M, K]: codes of :func:`quantize_rows` times their scales."""
    codes_MGk = codes_MK.float().unflatten(-1, (scale_MG.shape[-1], -1))
    return (codes_MGk * scale_MG[..., None]).flatten(-2)


def transform_quantize(
    x_MD: Tensor,
    p_DR: Tensor | None,
    t_DK: Tensor | None,
    spec: QuantSpec,
    smooth_D: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return codes int8 [M, K], scale float32 [M, G], c [M, R] in x's dtype: the parts above."""
    z_MK, c_MR = transform(x_MD, p_DR, t_DK, spec, smooth_D)
    return *quantize_rows(z_MK, spec), c_MR


def _fp4_rows(z_MK: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    z_MGk = z_MK.unflatten(-1, (-1, spec.act_group_size))
    amax_MG = z_MGk.abs().amax(-1)
    global_M1 = None
    if spec.activations.scale == "e4m3":
        global_M1 = fp4.global_scale(amax_MG.amax(-1, keepdim=True))
    step_MG = fp4.steps(fp4.group_scales(amax_MG, global_M1), global_M1)
    return fp4.nearest_e2m1(z_MGk, step_MG[..., None]).flatten(-2).to(torch.int8), step_MG


def _leading_bits(z_MK: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Round to 8 bits, then suppress the zeros that a group's magnitudes begin with (QuaRTZ)."""
    amax_M1 = z_MK.abs().amax(-1, keepdim=True)
    q_MK = (z_MK * _ratio(torch.full_like(amax_M1, LZS_LARGEST), amax_M1)).round()
    q_MGk = q_MK.clamp(-LZS_LARGEST, LZS_LARGEST).unflatten(-1, (-1, spec.act_group_size))
    # An integer's exponent is its number of bits; three are kept.
    shift_MG1 = (torch.frexp(q_MGk.abs().amax(-1, keepdim=True)).exponent - 3).clamp_min(0)
    unit_MG1 = torch.ldexp(torch.ones_like(q_MGk[..., :1]), shift_MG1)
    codes_MK = ((q_MGk / unit_MG1).trunc() * unit_MG1).flatten(-2)
    return codes_MK.to(torch.int8), amax_M1 / LZS_LARGEST


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is (all but) zero: such a row has codes 0, not inf * 0."""
    return torch.where(b > TINY, a / b, 0.0)
