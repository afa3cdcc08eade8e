"""Norms and rotations are found however diffusers writes them, and nothing else is taken for one.

The rule for accuracy: an error against float64 at most twice that of the unfused graph.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_ltx import apply_rotary_emb as of_ltx
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from rewritten import assert_near, compiled
from torch import Tensor, nn

BF16 = torch.bfloat16
BATCH, TOKENS, TEXT, HEADS, DIM = 2, 9, 5, 3, 32


# Every way to write it


def of_wan(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Its processor's own function."""
    x1, x2 = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = x1 * cos - x2 * sin
    out[..., 1::2] = x1 * sin + x2 * cos
    return out.type_as(x)


def of_z_image(x: Tensor, turns: Tensor) -> Tensor:
    with torch.amp.autocast("cuda", enabled=False):
        numbers = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(numbers * turns.unsqueeze(2)).flatten(3).type_as(x)


def of_ernie(x_in: Tensor, angles: Tensor) -> Tensor:
    """Halves, and channels behind the turned ones: none."""
    x, rest = x_in[..., : angles.shape[-1]], x_in[..., angles.shape[-1] :]
    x1, x2 = x.chunk(2, dim=-1)
    turned = torch.cat((-x2, x1), dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((x * cos + turned * sin, rest), dim=-1)


def normed(x: Tensor, w: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, (DIM,), w, 1e-6)


def by_hand(x: Tensor, w: Tensor) -> Tensor:
    """As diffusers' own module."""
    mean = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(mean + 1e-6)).to(w.dtype) * w


def over_all_heads(x: Tensor, w: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, (HEADS * DIM,), w.repeat(HEADS), 1e-6)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1))


def heads_first(x: Tensor) -> Tensor:
    return heads(x).transpose(1, 2)


def rotate(x: Tensor, t: Any, **how: Any) -> Tensor:
    return apply_rotary_emb(x, (t["cos"], t["sin"]), **how)


FORMS: dict[str, Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]] = {
    "neighbours": lambda x, w, t: rotate(normed(heads(x), w), t, sequence_dim=1),
    "neighbours, heads first": lambda x, w, t: rotate(by_hand(heads_first(x), w), t),
    "halves": lambda x, w, t: rotate(
        normed(heads(x), w), t, use_real_unbind_dim=-2, sequence_dim=1
    ),
    "halves, heads first": lambda x, w, t: rotate(heads_first(x), t, use_real_unbind_dim=-2),
    "lumina": lambda x, w, t: apply_rotary_emb(by_hand(heads(x), w), t["turns"], use_real=False),
    "qwen": lambda x, w, t: apply_rotary_emb_qwen(
        by_hand(heads(x), w), t["turns"][0], use_real=False
    ),
    "z-image": lambda x, w, t: of_z_image(by_hand(heads(x), w), t["turns"]),
    "ltx": lambda x, w, t: of_ltx(
        over_all_heads(x, w), (t["cos"].repeat(1, HEADS)[None], t["sin"].repeat(1, HEADS)[None])
    ),
    "wan": lambda x, w, t: of_wan(
        heads(over_all_heads(x, w)), t["cos"][None, :, None], t["sin"][None, :, None]
    ),
    "ernie": lambda x, w, t: of_ernie(normed(heads(x), w), t["angles"]),
    "norm alone": lambda x, w, t: by_hand(heads_first(x), w),
    "norm without weight": lambda x, w, t: RMSNorm(DIM, 1e-6, elementwise_affine=False)(heads(x)),
}


def given(tokens: int = TOKENS) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Numbers of a pair differ, as real tables' may: no rotation, but what functions compute."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    turns = torch.polar(torch.ones(1, tokens, DIM // 2), normal(1, tokens, DIM // 2))
    tables = {"cos": normal(tokens, DIM), "sin": normal(tokens, DIM), "turns": turns}
    tables["angles"] = normal(BATCH, tokens, 1, DIM)
    x = torch.exp(normal(BATCH, tokens, 1)) * normal(BATCH, tokens, HEADS * DIM)
    return x.to(BF16), (1 + 0.3 * normal(DIM)).to(BF16), tables


def in_float64(form: Callable[..., Tensor]) -> Tensor:
    """What the operator itself must come near to; casts to float32 inside of a form remain."""
    x, w, tables = given()
    return form(x.double(), w.double(), {n: t.double() if not t.is_complex() else t.to(
        torch.complex128) for n, t in tables.items()})  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_a_form_becomes_one_call(name):
    form = FORMS[name]
    call, backend = compiled(form)
    got, usual = call(*given()), form(*given())
    assert backend.counts == [1]
    assert_near(got, usual, in_float64(form))
    assert backend.calls[0][5] == ("halves" not in name and name != "ernie")


@torch.no_grad()
def test_sizes_that_are_symbols():
    call, backend = compiled(FORMS["neighbours"])
    for tokens in (TOKENS, 2 * TOKENS, 3 * TOKENS):
        torch.testing.assert_close(
            call(*given(tokens)), FORMS["neighbours"](*given(tokens)), atol=0.03, rtol=0.03
        )
    assert backend.counts == [1, 1]


@torch.no_grad()
def test_queries_and_keys_out_of_one_wide_linear():
    def block(x, w, t):
        qk = torch.cat([x, 2 * x], -1)
        q, k = qk[..., : HEADS * DIM], qk[..., HEADS * DIM :]
        return tuple(rotate(normed(heads(y), w), t, sequence_dim=1) for y in (q, k))

    call, backend = compiled(block)
    got = call(*given())
    assert backend.counts == [2]
    torch.testing.assert_close(got, block(*given()), atol=0.03, rtol=0.03)


@torch.no_grad()
def test_a_view_of_the_result_is_still_one():
    """The operator's result lies as the rotation's: rows after rows."""
    call, backend = compiled(lambda *a: FORMS["neighbours"](*a).view(BATCH, TOKENS, -1))
    assert call(*given()).shape == (BATCH, TOKENS, HEADS * DIM)
    assert backend.counts == [1]


@torch.no_grad()
def test_a_view_that_needs_heads_before_tokens_keeps_them():
    def viewed(x, w, t):
        return rotate(heads_first(x).contiguous(), t).view(BATCH * HEADS, TOKENS, DIM)

    call, backend = compiled(viewed)
    assert torch.equal(call(*given()), viewed(*given()))
    assert backend.counts == [0]


# What is left alone


def mean_taken_off(x, w, t):
    return nn.functional.layer_norm(heads(x), (DIM,), w, None, 1e-6)


def hidden_norm(x, w, t):
    """RMSNorm of hidden states with modulation: Inductor's."""
    return by_hand(x, w.repeat(HEADS)) * t["angles"][:1, :1, 0, :1]


def wrong_way_round(x, w, t):
    """Turns some pairs forward and others back."""
    first, second = heads(x).float().chunk(2, -1)
    cos, sin = t["cos"][None, :, None, ::2], t["sin"][None, :, None, ::2]
    turned = torch.cat([first * cos - second * sin, first * sin - second * cos], -1)
    return turned.to(x.dtype)


def over_tokens(x, w, t):
    x = x.float()
    return (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)).to(BF16).unflatten(-1, (3, -1))


def kept_in_float32(x, w, t):
    return heads(x).float() * torch.rsqrt(heads(x).float().pow(2).mean(-1, keepdim=True) + 1e-6)


def epsilon_of_the_dtype(x, w, t):
    return nn.functional.rms_norm(heads(x), (DIM,), w)


def tables_of_each_head(x, w, t):
    cos, sin = (t[n][None, :, None].expand(1, -1, HEADS, -1) * 2 for n in ("cos", "sin"))
    x1, x2 = heads(x).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-x2, x1], -1).flatten(3)
    return (heads(x).float() * cos + turned.float() * sin).to(x.dtype)


LEFT = [
    mean_taken_off, hidden_norm, wrong_way_round, over_tokens, kept_in_float32,
    epsilon_of_the_dtype, tables_of_each_head,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("function", LEFT, ids=lambda f: f.__name__)
def test_other_functions_are_left_alone(function):
    call, backend = compiled(function)
    assert torch.equal(call(*given()), function(*given()))
    assert backend.counts == [0]


@torch.no_grad()
def test_eight_bits_are_not_rounding():
    """The norm before them becomes a call; what is rounded to 8 bits stays so."""

    def rounded(x, w, t):
        return normed(heads(x), w).to(torch.float8_e4m3fn).to(BF16)

    call, backend = compiled(rounded)
    got = call(*given())
    assert backend.counts == [1]
    assert torch.equal(got, got.to(torch.float8_e4m3fn).to(BF16))


@torch.no_grad()
def test_who_reads_a_value_in_between_still_can():
    """The norm's result is read by others too: norm and rotation stay two calls."""

    def both(x, w, t):
        y = normed(heads(x), w)
        return rotate(y, t, sequence_dim=1), y + 1

    call, backend = compiled(both)
    torch.testing.assert_close(call(*given()), both(*given()), atol=0.03, rtol=0.03)
    assert [(args[2] is None, args[3] == [None]) for args in backend.calls] == [
        (False, True), (True, False),
    ]  # fmt: skip


@torch.no_grad()
def test_what_is_written_in_between_counts():
    def written(x, w, t):
        y = heads(x).clone()
        first, second = y.float().chunk(2, -1)
        y.mul_(2)
        cos, sin = (t[n][None, :, None] for n in ("cos", "sin"))
        kept, turned = torch.cat([first, second], -1), torch.cat([-second, first], -1)
        return (kept * cos + turned * sin).to(BF16)

    call, _ = compiled(written)
    torch.testing.assert_close(call(*given()), written(*given()), atol=0.03, rtol=0.03)


@torch.no_grad()
def test_without_a_kernel_plain_torch_stays():
    call, backend = compiled(FORMS["neighbours"], anywhere=False)
    assert torch.equal(call(*given()), FORMS["neighbours"](*given()))
    assert backend.counts == [0]


def test_with_gradients_plain_torch_stays():
    x, w, tables = given()
    call, backend = compiled(FORMS["neighbours"])
    call(x.requires_grad_(), w, tables).sum().backward()
    assert backend.counts == [0] and x.grad is not None


@torch.no_grad()
def test_concatenations_of_other_things_stay():
    def joined(x, w, t):
        return torch.cat([normed(heads(x), w), heads(x)], 1)

    call, backend = compiled(joined)
    torch.testing.assert_close(call(*given()), joined(*given()), atol=0.03, rtol=0.03)
    assert backend.counts == [1] and len(backend.calls[0][0]) == 1
