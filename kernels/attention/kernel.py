"""Triton engine of 8-bit attention: launches the kernels (codes.py, forward.py) on real tensors."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..build import Config
from ..chip import capability
from . import codes as quantizing
from .forward import forward
from .reference import K_BLOCK

INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2E = 1.4426950408889634
CHUNKS = quantizing.CHUNKS.value
STEP = 32
"""Tokens that ``summarize`` reads at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Launch configuration of ``forward``: queries and keys at a time, warps, pipeline stages.

    tma        the tensor memory accelerator reads the codes
    registers  a thread's at most: few, so that more programs share a processor, or 255, so that
               none spill to get there, where keys end with a block; None: the compiler's choice
    """

    bm: int
    bn: int
    warps: int
    stages: int
    tma: bool
    registers: int | None = None


HOPPER = Tile(bm=64, bn=128, warps=4, stages=2, tma=True, registers=168)
OTHERS = Tile(bm=128, bn=64, warps=8, stages=2, tma=False, registers=255)
"""Without descriptors: those of Hopper's successors are not Hopper's."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Codes and scales as ``forward`` reads them (codes.py)."""

    q_LTd: Tensor
    k_LSd: Tensor
    v_LdS: Tensor
    q_scale_LT: Tensor
    k_scale_LN: Tensor
    v_scale_Ld: Tensor
    v_mean_Ld: Tensor


def launch(
    q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, *, scale: float, tile: Tile | None = None
) -> Tensor:
    """Compute :func:`.reference.attention`: contiguous [B, T, H, d] in q's dtype.

    q_BTHd, k_BSHd, v_BSHd  bf16, fp16 or float32; of other strides than channels' being 1, a copy
                            is made
    scale                   factor of the logits
    tile                    None: the chip's, which :func:`..attention.why_not` must allow
    """
    y_BTHd = q_BTHd.new_empty(q_BTHd.shape)
    if y_BTHd.numel() == 0:
        return y_BTHd
    with torch.cuda.device_of(q_BTHd):
        stored = quantized(q_BTHd, k_BSHd, v_BSHd, scale=scale)
        attend(stored, y_BTHd, k_BSHd.shape[1], tile or usual(capability(q_BTHd.device)))
    return y_BTHd


def usual(chip: int | None) -> Tile:
    return HOPPER if chip == 90 else OTHERS


def quantized(q_BTHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, *, scale: float) -> Stored:
    """Compute codes and scales (:func:`.reference.quantize`), filled up to whole blocks."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q_BTHd, k_BSHd, v_BSHd))
    (b, t, h, d), s = q.shape, k.shape[1]
    hd, n_q, n_s = _width(d), triton.cdiv(t, K_BLOCK), triton.cdiv(s, K_BLOCK)
    new, heads = q.new_empty, b * h
    sums = new((heads, 4, CHUNKS, hd), dtype=torch.float32)
    stored = Stored(
        new((heads, n_q * K_BLOCK, hd), dtype=torch.int8),
        new((heads, n_s * K_BLOCK, hd), dtype=torch.int8),
        new((heads, hd, n_s * K_BLOCK), dtype=torch.float8_e4m3fn),
        *(new((heads, n), dtype=torch.float32) for n in (n_q * K_BLOCK, n_s, hd, hd)),
    )
    strides = [x.stride()[:3] for x in (q, k, v)]
    chunk = triton.cdiv(triton.cdiv(s, CHUNKS), STEP) * STEP
    summarize_config(d).launch(
        (heads, CHUNKS, 2), k, v, sums, s, h, *strides[1], *strides[2], chunk
    )
    round_config(d).launch(
        (n_q + 2 * n_s, heads),
        q, k, v, sums, stored.q_LTd, stored.k_LSd, stored.v_LdS, stored.q_scale_LT,
        stored.k_scale_LN, stored.v_scale_Ld, stored.v_mean_Ld, t, s, h,
        *strides[0], *strides[1], *strides[2], n_q, n_s, scale * LOG2E,
    )  # fmt: skip
    return stored


def attend(stored: Stored, y_BTHd: Tensor, keys: int, tile: Tile) -> None:
    """Fill y from codes of q and of ``keys`` keys and values."""
    _, t, h, d = y_BTHd.shape
    heads, hd, filled = stored.v_LdS.shape
    q, k, v = stored.q_LTd.view(-1, hd), stored.k_LSd.view(-1, hd), stored.v_LdS.view(-1, filled)
    if tile.tma:
        q = TensorDescriptor.from_tensor(q, [tile.bm, hd])
        k = TensorDescriptor.from_tensor(k, [tile.bn, hd])
        v = TensorDescriptor.from_tensor(v, [hd, tile.bn])
    forward_config(tile, d, keys).launch(
        (triton.cdiv(t, tile.bm) * heads,),
        q, k, v, stored.q_scale_LT, stored.k_scale_LN, stored.v_scale_Ld, stored.v_mean_Ld, y_BTHd,
        t, keys, h, stored.q_LTd.shape[1] // K_BLOCK, filled // K_BLOCK, *y_BTHd.stride()[:3],
    )  # fmt: skip


def summarize_config(d: int) -> Config:
    """``d``: channels of a head."""
    return Config(kernel=quantizing.summarize, constants={"D": d, "HD": _width(d), "BS": STEP})


def round_config(d: int) -> Config:
    constants = {"D": d, "HD": _width(d), "BY_HAND": INTERPRETED}
    return Config(kernel=quantizing.round_codes, constants=constants, warps=8)


def forward_config(tile: Tile, d: int, keys: int) -> Config:
    even = keys % tile.bn == 0
    constants = {
        "D": d, "EVEN": even, "BY_HAND": INTERPRETED, "HD": _width(d), "BM": tile.bm,
        "BN": tile.bn, "TMA": tile.tma,
    }  # fmt: skip
    # The mask of a ragged end takes more registers.
    return Config(
        kernel=forward, constants=constants, warps=tile.warps, stages=tile.stages,
        registers=tile.registers if even else None,
    )  # fmt: skip


def _width(d: int) -> int:
    """Channels of a head as stored: a power of two, and what INT8 matrix units take at a time."""
    return max(32, triton.next_power_of_2(d))
