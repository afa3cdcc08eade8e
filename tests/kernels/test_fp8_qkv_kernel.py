"""The Triton kernels of q, k and v in FP8 against their specification.

fp16: the interpreter has no bf16.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dirotq.kernels.fp8_qkv import kernel, reference
from dirotq.kernels.fp8_qkv.kernel import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = pytest.mark.parametrize(
    ("B", "T", "S", "H", "d"),
    [(1, 64, 64, 1, 64), (2, 5, 130, 2, 32), (1, 131, 70, 1, 128), (1, 70, 1, 2, 48)],
    ids=["whole-blocks", "batch-of-two", "wide", "blocks-of-a-head"],
)


def qkv(B: int, T: int, S: int, H: int, d: int) -> list[Tensor]:
    """k with a channel offset, heads of different sizes, as real ones have."""
    g = torch.Generator().manual_seed(B * 1000 + T * 100 + S + d)
    q, k, v = (torch.randn(B, n, H, d, generator=g) for n in (T, S, S))
    size = torch.arange(1, H + 1)[:, None]
    k += 4 * torch.randn(1, 1, H, d, generator=g)
    return [(t * size).half().to(DEVICE) for t in (q, k, v)]


def assert_codes(got: reference.Codes, want: reference.Codes, differ: float = 2e-3) -> None:
    for name in ("q_scale_BH", "k_scale_BH", "v_scale_BH"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=0)
    for name in ("q_BTHd", "k_BSHd", "v_BSHd"):
        ours, theirs = (getattr(codes, name) for codes in (got, want))
        assert ours.shape == theirs.shape
        assert ours.is_contiguous()
        # Sums in another order: what stands at a tie may fall to the other side.
        off = ours.float() - theirs.float()
        assert (off != 0).float().mean() < differ, name
        assert (off.abs() <= 0.13 * theirs.float().abs() + 0.01).all(), name


@SHAPES
def test_codes_are_the_specifications(B, T, S, H, d, empty_is):
    args = qkv(B, T, S, H, d)
    with empty_is(255):
        got = launch(*args)
    want = reference.quantize(*args)
    if S == 1:  # of one key nothing but rounding is left
        assert got.k_BSHd.float().abs().max() < 0.1
        want = dataclasses.replace(want, k_BSHd=got.k_BSHd)
    assert_codes(got, want)


def test_more_tokens_than_a_program_takes(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCKS", 2)
    args = qkv(1, 300, 290, 1, 16)
    assert_codes(launch(*args), reference.quantize(*args))


def test_rows_and_heads_may_lie_apart():
    wide = torch.full((2, 40, 2, 5, 24), torch.nan, dtype=torch.float16, device=DEVICE)
    views = []
    for i, t in enumerate(qkv(2, 40, 40, 2, 16)):
        view = wide[:, :, :, i, 4:20]
        view.copy_(t)
        views.append(view)
    got, want = launch(*views), launch(*qkv(2, 40, 40, 2, 16))
    for name in ("q_BTHd", "k_BSHd", "v_BSHd"):
        assert torch.equal(
            getattr(got, name).view(torch.uint8), getattr(want, name).view(torch.uint8)
        )


def test_channels_that_lie_apart_are_copied():
    args = qkv(1, 40, 40, 1, 32)
    apart = [torch.stack([t, t], -1)[..., 0] for t in args]
    assert_codes(launch(*apart), launch(*args), differ=1e-9)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_head_of_zeros(which):
    args = qkv(1, 20, 40, 2, 32)
    args[which][:, :, 1] = 0
    got = launch(*args)
    names = ("q_BTHd", "q_scale_BH"), ("k_BSHd", "k_scale_BH"), ("v_BSHd", "v_scale_BH")
    codes, scale = (getattr(got, name) for name in names[which])
    assert not codes[:, :, 1].float().any()
    assert scale[0, 1] == 1
    assert codes[:, :, 0].float().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_bad_numbers_show_and_stay_in_their_head(which, bad):
    args = qkv(1, 20, 70, 2, 16)
    want = launch(*args)
    args[which][0, 3, 1, 5] = bad
    got = launch(*args)
    scales = got.q_scale_BH, got.k_scale_BH, got.v_scale_BH
    assert scales[which][0, 1].isnan()
    assert all(s[0, 0].isfinite() for s in scales)
    before = want.q_BTHd, want.k_BSHd, want.v_BSHd
    for ours, theirs in zip((got.q_BTHd, got.k_BSHd, got.v_BSHd), before):
        assert torch.equal(ours[:, :, 0].float(), theirs[:, :, 0].float())
