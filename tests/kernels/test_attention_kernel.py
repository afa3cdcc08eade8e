"""The Triton engine of 8-bit attention against its specification, on the CPU's interpreter.

fp16: the interpreter has no bf16.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from builds.attention import builds

from dirotq.kernels.attention import reference
from dirotq.kernels.attention.kernel import HOPPER, OTHERS, launch, quantized, usual
from dirotq.kernels.attention.reference import K_BLOCK
from dirotq.kernels.build import FP8_CHIPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POINTERS = dataclasses.replace(OTHERS, bm=64, warps=4)
ON = pytest.mark.parametrize(
    "tile",
    [
        pytest.param(POINTERS, id="pointers"),
        pytest.param(
            HOPPER,
            id="tma",
            marks=pytest.mark.skipif(
                torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0),
                reason="the GPU has no tensor memory accelerator like Hopper's",
            ),
        ),
    ],
)
SHAPES = pytest.mark.parametrize(
    ("B", "T", "S", "H", "d"),
    [(1, 128, 128, 1, 64), (2, 5, 130, 2, 32), (1, 131, 300, 1, 72), (1, 1, 1, 1, 128)],
    ids=["whole-blocks", "batch-of-two", "odd", "one-token"],
)


def qkv(B: int, T: int, S: int, H: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """k and v with a channel offset, as real ones have."""
    g = torch.Generator().manual_seed(B * 1000 + T * 100 + S + d)
    q, k, v = (torch.randn(B, n, H, d, generator=g) for n in (T, S, S))
    k += 4 * torch.randn(1, 1, H, d, generator=g)
    v += torch.randn(1, 1, H, d, generator=g)
    return tuple(t.half().to(DEVICE) for t in (q, k, v))


def renamed(places: int) -> Tensor:
    """Token at each place of v's codes, in plain torch: bits h a q q b at h q q a b."""
    n = torch.arange(places).view(-1, 2, 2, 4, 2)  # places' bits: h, a, q, q, b
    return n.transpose(2, 3).flatten()


def differing(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).abs().gt(0).float().mean())


@SHAPES
def test_codes_are_the_specifications(B, T, S, H, d, empty_is):
    q, k, v = qkv(B, T, S, H, d)
    want = reference.quantize(q, k, v, scale=0.3)
    with empty_is(255):
        got = quantized(q, k, v, scale=0.3)

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(0, (B, H))

    # Means are added up in another order: what stands at a tie may fall to the other side.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(heads(got.q_scale_LT)[:, :, :T], want.q_scale_BHT, **close)
    torch.testing.assert_close(heads(got.k_scale_LN), want.k_scale_BHN, **close)
    torch.testing.assert_close(heads(got.v_scale_Ld)[:, :, :d], want.v_scale_BHd, **close)
    torch.testing.assert_close(heads(got.v_mean_Ld)[:, :, :d], want.v_mean_BHd, **close)
    assert differing(heads(got.q_LTd)[:, :, :T, :d], want.q_BHTd) < 1e-3
    assert differing(heads(got.k_LSd)[:, :, :S, :d], want.k_BHSd) < 1e-3
    stored = heads(got.v_LdS)[..., torch.argsort(renamed(got.v_LdS.shape[2]))]
    if S > 1:  # of one token nothing but its mean is left, and rounding
        assert differing(stored[:, :, :d, :S].mT, want.v_BHSd) < 1e-3
    filled = (got.q_LTd[:, T:], got.k_LSd[:, S:], stored.flatten(0, 1)[:, :, S:].float())
    assert not any(t.any() for t in filled)
    assert not any(t[..., d:].any() for t in (got.q_LTd, got.k_LSd, got.v_scale_Ld, got.v_mean_Ld))


@ON
@SHAPES
def test_output_is_the_specifications(tile, B, T, S, H, d, empty_is):
    q, k, v = qkv(B, T, S, H, d)
    codes = reference.quantize(q, k, v, scale=d**-0.5)
    want = reference.attend(codes, block=tile.bn).transpose(1, 2)
    with empty_is(255):
        got = launch(q, k, v, scale=d**-0.5, tile=tile)
    assert got.dtype == q.dtype
    assert got.shape == q.shape
    assert got.is_contiguous()
    # fp16 output, and a code of q, k, P or v at a tie here and there.
    error = (got.float() - want).norm() / want.norm()
    assert error < 1e-3


def test_rows_and_heads_may_lie_apart():
    wide = torch.full((2, 40, 2, 5, 24), torch.nan, dtype=torch.float16, device=DEVICE)
    views = []
    for i, t in enumerate(qkv(2, 40, 40, 2, 16)):
        view = wide[:, :, :, i, 4:20]
        view.copy_(t)
        views.append(view)
    want = launch(*qkv(2, 40, 40, 2, 16), scale=0.2, tile=POINTERS)
    assert torch.equal(launch(*views, scale=0.2, tile=POINTERS), want)


def test_channels_that_lie_apart_are_copied():
    q, k, v = qkv(1, 40, 40, 1, 32)
    want = launch(q, k, v, scale=0.2, tile=POINTERS)
    apart = [torch.stack([t, t], -1)[..., 0] for t in (q, k, v)]
    assert torch.equal(launch(*apart, scale=0.2, tile=POINTERS), want)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_head_of_zeros(which):
    args = list(qkv(1, 20, 200, 2, 32))
    args[which][:, :, 1] = 0
    got = launch(*args, scale=0.2, tile=POINTERS)
    want = reference.attention(*args, scale=0.2)
    torch.testing.assert_close(got, want, rtol=0, atol=3e-2)
    if which < 2:  # equal logits: the mean of v, but for the rounding of v
        mean = args[2][:, :, 1].float().mean(1, keepdim=True).expand(1, 20, 32)
        torch.testing.assert_close(got[:, :, 1].float(), mean, rtol=0, atol=1e-2)
    else:
        assert not got[:, :, 1].any()


def test_logits_far_below_zero_are_not_beaten_by_filling():
    """The last block's empty places have logits of 0, if not told apart."""
    q, k, v = qkv(1, 16, 100, 1, 32)
    k[:, ::2] = q[:, :1] * -4  # smoothing makes half of them low, half of them high
    k[:, 1::2] = q[:, :1] * -3
    got = launch(q, k, v, scale=3.0, tile=POINTERS)
    want = reference.attention(q, k, v, scale=3.0)
    assert float((got.float() - want.float()).norm() / want.float().norm()) < 2e-2


@pytest.mark.parametrize("which", [0, 1, 2])
def test_bad_numbers_show_and_stay_in_their_head(which):
    args = qkv(1, 20, 140, 2, 32)
    want = launch(*args, scale=0.2, tile=POINTERS)
    args[which][0, 3, 1, 5] = torch.nan
    got = launch(*args, scale=0.2, tile=POINTERS)
    assert torch.equal(got[:, :, 0], want[:, :, 0])
    assert got[0, 3, 1].isnan().any()


def test_no_queries():
    q, k, v = qkv(1, 8, 8, 1, 32)
    assert launch(q[:, :0], k, v, scale=1.0).shape == (1, 0, 1, 32)


def test_a_block_of_keys_holds_whole_steps():
    for tile in (HOPPER, OTHERS):
        assert K_BLOCK % tile.bn == K_BLOCK % tile.bm == 0


def test_hopper_and_the_others_have_tiles_of_their_own():
    assert usual(90).tma
    assert not any(usual(chip).tma for chip in FP8_CHIPS if chip != 90)


def test_builds_cover_every_tile():
    names = [build.name for build in builds()]
    assert len(set(names)) == len(names)
    forward = [b for b in builds() if b.tensor_core]
    for chip in FP8_CHIPS:
        ours = {(b.constants["BM"], b.constants["BN"]) for b in forward if chip in b.chips}
        assert ours == {(usual(chip).bm, usual(chip).bn)}
