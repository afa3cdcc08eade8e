"""``qk_norm_rope`` held to diffusers' own pieces and to what rotations keep."""

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor

from dirotq.kernels import qk_norm_rope as op
from dirotq.kernels.qk_norm_rope import Part, qk_norm_rope, reference

EPS = 1e-6


def qkv(tokens: int, columns: int, *, batch: int = 2, dtype=torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, columns, generator=generator).to(dtype)


def weight(dim: int, seed: int, dtype=torch.float32) -> Tensor:
    return (1 + 0.3 * torch.randn(dim, generator=torch.Generator().manual_seed(seed))).to(dtype)


def rope_of(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """As FLUX makes it, of three axes."""
    axes = [dim - 2 * (dim // 4 * 2 // 2), dim // 4 * 2 // 2, dim // 4 * 2 // 2]
    ids = torch.stack([torch.arange(tokens) * scale for scale in (0, 1, 3)], 1)
    return FluxPosEmbed(theta=10000, axes_dim=axes)(ids.float())


def of_diffusers(parts: list[Part], rope, heads: int):
    """FluxAttnProcessor.__call__ up to its attention."""
    made = []
    for part in parts:
        dim = part.q_weight.shape[0]
        q, k, v = part.qkv_BTC[..., : 3 * heads * dim].chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        norms = [torch.nn.RMSNorm(dim, eps=EPS, dtype=q.dtype) for _ in "qk"]
        for norm, values in zip(norms, (part.q_weight, part.k_weight)):
            norm.weight.data.copy_(values)
        made.append((norms[0](q), norms[1](k), v))
    q, k, v = (torch.cat(t, dim=1) for t in zip(*made))
    if rope is not None:
        q = apply_rotary_emb(q, rope, sequence_dim=1)
        k = apply_rotary_emb(k, rope, sequence_dim=1)
    return q, k, v


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [(7,), (5, 12)], ids=["single", "double"])
@pytest.mark.parametrize("turned", [True, False], ids=["rope", "no rope"])
def test_is_what_diffusers_computes(dtype, tokens, turned):
    heads, dim, beside = 3, 32, 40
    parts = [
        Part(
            qkv_BTC=qkv(t, 3 * heads * dim + beside, dtype=dtype, seed=i),
            q_weight=weight(dim, 10 + i, dtype),
            k_weight=weight(dim, 20 + i, dtype),
        )
        for i, t in enumerate(tokens)
    ]
    rope = rope_of(sum(tokens), dim) if turned else None
    got = qk_norm_rope(parts, rope, heads=heads, eps=EPS)
    for mine, theirs in zip(got, of_diffusers(parts, rope, heads), strict=True):
        assert mine.dtype == dtype
        assert mine.shape == (2, sum(tokens), heads, dim)
        assert torch.equal(mine, theirs)


def test_rotation_keeps_norms_and_the_angle_between_tokens():
    heads, dim = 2, 16
    x = qkv(9, 3 * heads * dim).double()
    x[:, 1:] = x[:, :1]  # one token everywhere: scores depend on the distance alone
    angle = torch.arange(9.0)[:, None] * 100.0 ** -torch.linspace(0, 1, dim // 2)
    rope = tuple(t.repeat_interleave(2, 1) for t in (angle.cos(), angle.sin()))
    q, k, _ = qk_norm_rope([Part(qkv_BTC=x)], rope, heads=heads, eps=0.0)
    assert torch.allclose(q.norm(dim=-1), torch.full((2, 9, heads), dim**0.5).double(), rtol=1e-6)
    scores = torch.einsum("bthd,bshd->bhts", q, k)
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance, dim1=-2, dim2=-1)
        torch.testing.assert_close(
            diagonal, diagonal[..., :1].expand_as(diagonal), rtol=0, atol=1e-5
        )


def test_angle_zero_is_the_norm_alone():
    x, w = qkv(5, 96), weight(16, 1)
    part = Part(qkv_BTC=x, q_weight=w, k_weight=w)
    none = torch.ones(5, 16), torch.zeros(5, 16)
    turned = qk_norm_rope([part], none, heads=2, eps=EPS)
    for got, want in zip(turned, qk_norm_rope([part], None, heads=2, eps=EPS), strict=True):
        assert torch.equal(got, want)
    q = x[..., :32].unflatten(-1, (2, 16))
    want = q / (q.square().mean(-1, keepdim=True) + EPS).sqrt() * w
    torch.testing.assert_close(turned[0], want)


def test_a_quarter_turn_swaps_neighbours():
    x = qkv(1, 12, batch=1)
    rope = torch.zeros(1, 4), torch.ones(1, 4)
    q, _, _ = qk_norm_rope([Part(qkv_BTC=x)], rope, heads=1, eps=EPS)
    plain, _, _ = qk_norm_rope([Part(qkv_BTC=x)], None, heads=1, eps=EPS)
    a, b, c, d = plain.flatten()
    assert torch.equal(q.flatten(), torch.stack([-b, a, -d, c]))


def test_v_of_one_part_is_a_view():
    x = qkv(4, 100)
    v = qk_norm_rope([Part(qkv_BTC=x, q_weight=weight(16, 0))], None, heads=2, eps=EPS)[2]
    assert torch.equal(v, x[..., 64:96].unflatten(-1, (2, 16)))
    assert v.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_float64_stays_float64():
    part = Part(qkv_BTC=qkv(3, 96).double())
    rope = rope_of(3, 16)
    wide = qk_norm_rope([part], rope, heads=2, eps=EPS)[0]
    narrow = qk_norm_rope([Part(qkv_BTC=part.qkv_BTC.float())], rope, heads=2, eps=EPS)[0]
    assert wide.dtype == torch.float64
    assert not torch.equal(wide, wide.float().double())
    torch.testing.assert_close(wide.float(), narrow)


ONE = {"qkv_BTC": torch.zeros(2, 5, 96)}


@pytest.mark.parametrize(
    ("parts", "rope", "said"),
    [
        ([], None, "0 parts"),
        ([ONE] * 3, None, "3 parts"),
        ([{"qkv_BTC": torch.zeros(5, 96)}], None, r"shape \(5, 96\).*\[batch, tokens, columns\]"),
        ([{"qkv_BTC": torch.zeros(2, 96, 5).mT}], None, "neighbouring columns"),
        ([ONE, {"qkv_BTC": torch.zeros(1, 5, 96)}], None, "batch 2 .* batch 1"),
        (
            [ONE, {"qkv_BTC": torch.zeros(2, 5, 96).half()}],
            None,
            "float32 on cpu, .* of torch.float16",
        ),
        ([ONE, ONE | {"k_weight": torch.ones(16)}], None, "one part with a k_weight"),
        ([ONE | {"q_weight": torch.ones(16), "k_weight": torch.ones(8)}], None, "shapes"),
        (
            [ONE | {"q_weight": torch.ones(16), "k_weight": torch.ones(16).half()}],
            None,
            "one dtype",
        ),
        ([ONE | {"q_weight": torch.ones(15)}], None, "heads of 15 channels"),
        ([ONE | {"q_weight": torch.ones(32)}], None, "96 columns .* at least 192"),
        ([ONE], (torch.ones(4, 16), torch.ones(4, 16)), r"for 5 tokens: give two of \[5, 16\]"),
    ],
)
def test_what_does_not_go_together_is_refused(parts, rope, said):
    with pytest.raises(ValueError, match=said):
        qk_norm_rope([Part(**part) for part in parts], rope, heads=2, eps=EPS)


class OnGpu:
    """As much of a CUDA tensor as the choice of a path looks at."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.mark.parametrize(
    ("dtype", "dim", "chip", "compiling", "taken", "said"),
    [
        (torch.bfloat16, 128, 90, False, "kernel", ""),
        (torch.float16, 72, 80, False, "kernel", ""),
        (torch.bfloat16, 128, 75, False, "reference", "compute capability 7.5"),
        (torch.float32, 128, 90, False, "reference", "float32 is computed as specified"),
        (torch.bfloat16, 260, 90, False, "reference", "heads of 260 channels"),
        (torch.bfloat16, 128, 90, True, "reference", ""),
    ],
)
def test_a_gpu_takes_the_kernel_and_says_if_it_cannot(
    dtype, dim, chip, compiling, taken, said, monkeypatch
):
    kernel = pytest.importorskip("dirotq.kernels.qk_norm_rope.kernel")
    messages: list[str] = []
    monkeypatch.setattr(op, "capability", lambda device: chip)
    monkeypatch.setattr(op, "check", lambda *_: dim)
    monkeypatch.setattr(op, "say_once", lambda message, level: messages.append(message))
    monkeypatch.setattr(kernel, "launch", lambda *_, **__: "kernel")
    monkeypatch.setattr(reference, "qk_norm_rope", lambda *_, **__: "reference")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    assert qk_norm_rope([Part(qkv_BTC=OnGpu(dtype))], None, heads=1, eps=EPS) == taken
    assert len(messages) == bool(said)
    assert all(said in message for message in messages)
