"""``norm_rope`` on a real GPU: dtypes, strides and forms, in a graph, and out of Inductor.

The rule: against float64, an error below twice that of plain torch in the same dtype.
"""

import pytest
import torch
from tiny_families import TINY
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

pytest.importorskip("triton")

from dirotq.kernels.attention import why_not
from dirotq.kernels.chip import capability
from dirotq.kernels.norm_rope import codes as into_fp8
from dirotq.kernels.norm_rope import reference
from dirotq.runtime.passes.norm_rope import OPERATOR, rewrite

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("full_float32"),
]

CHIP = capability(torch.device("cuda")) if torch.cuda.is_available() else 90
FP8 = pytest.mark.skipif(bool(why_not(CHIP)), reason="no FP8 on this GPU")
EPS = 1e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
PAIRS = pytest.mark.parametrize("interleaved", [True, False], ids=["neighbours", "halves"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda")


def wide(tokens: int, heads: int, dim: int, dtype: torch.dtype, *, batch: int = 2) -> Tensor:
    """The second third of a wide linear's outputs."""
    x = normal(batch, tokens, 3 * heads * dim + 8, seed=tokens).to(dtype)
    return x[..., heads * dim : 2 * heads * dim].unflatten(-1, (heads, dim))


def tables(tokens: int, count: int) -> tuple[Tensor, Tensor]:
    return normal(1, tokens, 1, count, seed=1), normal(1, tokens, 1, count, seed=2)


def assert_accurate(parts, weights, eps, cos, sin, interleaved) -> Tensor:
    def double(some):
        return [None if t is None else t.double() for t in some]

    got = OPERATOR(parts, weights, eps, cos, sin, interleaved)
    plain = reference.norm_rope(parts, weights, eps, cos, sin, interleaved)
    true = reference.norm_rope(
        double(parts), double(weights), eps, double(cos), double(sin), interleaved
    )
    assert got.dtype == parts[0].dtype and got.shape == true.shape and got.is_contiguous()
    ours, torchs = ((y.double() - true).norm() / true.norm() for y in (got, plain))
    assert ours <= 2 * torchs, f"relative error {ours:.2e}, plain torch {torchs:.2e}"
    return got


@DTYPES
@PAIRS
@pytest.mark.parametrize("count", [1, 2], ids=["pair", "channel"])
@pytest.mark.parametrize("dim", [32, 64, 72, 128, 256])
def test_heads_and_tables(dim, count, interleaved, dtype):
    weight = (1 + 0.3 * normal(dim)).to(dtype)
    cos, sin = tables(519, dim // 2 * count)
    assert_accurate([wide(519, 5, dim, dtype)], [weight], EPS, [cos], [sin], interleaved)


@DTYPES
@PAIRS
def test_text_and_image(interleaved, dtype):
    parts = [wide(tokens, 24, 128, dtype) for tokens in (77, 1024)]
    weights = [(1 + 0.3 * normal(128, seed=i)).to(dtype) for i in range(2)]
    cos, sin = tables(1101, 128)
    assert_accurate(parts, weights, EPS, [cos], [sin], interleaved)
    own = [list(t.split([77, 1024], 1)) for t in (cos, sin)]
    assert_accurate(parts, weights, EPS, *own, interleaved)
    assert_accurate(parts, weights, EPS, [None, own[0][1]], [None, own[1][1]], interleaved)


@DTYPES
def test_norms_over_all_heads_and_heads_that_are_all(dtype):
    weight = (1 + 0.3 * normal(40 * 128)).to(dtype)
    cos, sin = tables(300, 128)
    pairs = [cos[..., 0::2]], [sin[..., 1::2]]
    assert_accurate([wide(300, 40, 128, dtype)], [weight], EPS, *pairs, True)
    cos, sin = tables(300, 2048)
    assert_accurate([wide(300, 1, 2048, dtype)], [weight[:2048]], EPS, [cos], [sin], True)


@DTYPES
def test_either_step_alone_and_heads_before_tokens(dtype):
    x, (cos, sin) = wide(300, 6, 64, dtype), tables(300, 32)
    first = x.transpose(1, 2).contiguous().transpose(1, 2)
    for one in (x, first, wide(64, 300, 6, dtype).transpose(1, 3)):
        assert_accurate([one], [None], EPS, [None], [None], True)
    assert_accurate([x], [None], None, [cos], [sin], True)


def test_the_imaginary_numbers_beside_the_real_ones():
    turns = torch.polar(torch.ones(300, 64, device="cuda"), normal(300, 64))
    cos, sin = torch.view_as_real(turns)[None, :, None].unbind(-1)
    x = wide(300, 30, 128, torch.bfloat16)
    got = assert_accurate([x], [None], EPS, [cos], [sin], True)
    normed = torch.nn.functional.rms_norm(x.double(), (128,), None, EPS).unflatten(-1, (-1, 2))
    true = torch.view_as_real(torch.view_as_complex(normed) * turns[:, None]).flatten(3)
    assert (got.double() - true).norm() < 0.004 * true.norm()


def test_no_tokens_and_a_million_rows():
    empty = wide(0, 2, 64, torch.bfloat16)
    assert OPERATOR([empty], [None], EPS, [None], [None], True).shape == (2, 0, 2, 64)
    x = wide(33000, 40, 128, torch.bfloat16, batch=1)
    cos, sin = tables(33000, 64)
    assert_accurate([x], [None], EPS, [cos], [sin], True)


def test_a_graph_replays_it_on_new_numbers():
    parts = [wide(tokens, 4, 128, torch.bfloat16) for tokens in (7, 200)]
    cos, sin = tables(207, 128)
    arguments = parts, [None, None], EPS, [cos], [sin], True
    OPERATOR(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = OPERATOR(*arguments)
    for part in parts:
        part.mul_(-1)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, OPERATOR(*arguments))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind", "calls"),
    [
        ("flux", "FluxTransformerBlock", 2),
        ("flux", "FluxSingleTransformerBlock", 2),
        ("flux2", "Flux2TransformerBlock", 2),
        ("qwen_image", "QwenImageTransformerBlock", 2),
        ("z_image", "ZImageTransformerBlock", 2),
        ("wan", "WanTransformerBlock", 2),
        ("sd3", "JointTransformerBlock", 4),
    ],
)
def test_blocks_out_of_inductor(name, kind, calls):
    """A family's first block, rewritten and compiled, against the block as it is."""
    tiny = TINY[name]
    inputs = tiny.inputs()
    if name == "flux":
        del inputs["guidance"]
    model = tiny.build()
    block = next(m for m in model.modules() if type(m).__name__ == kind)
    seen = []
    hook = block.register_forward_pre_hook(lambda m, *call: seen.append(call), with_kwargs=True)
    model(**inputs)
    hook.remove()
    (args, kwargs), rope = seen[0], 32

    def move(value, dtype):
        if not isinstance(value, Tensor):
            return value
        rows = value.is_floating_point() and value.shape[-1] > rope  # tables stay in float32
        return value.to("cuda", dtype if rows else None)

    def run(call, dtype):
        block.to("cuda", dtype)
        moved = tree_map(lambda v: move(v, dtype), (args, kwargs))
        return tree_leaves(call(*moved[0], **moved[1]))

    counts = []

    def backend(module, example_inputs):
        counts.append(rewrite(module))
        module.recompile()
        return torch._inductor.compile(module, list(example_inputs))

    torch._dynamo.reset()
    true, usual = run(block, torch.float64), run(block, torch.bfloat16)
    got = run(torch.compile(block, backend=backend, fullgraph=True), torch.bfloat16)
    assert counts == [calls]
    for mine, theirs, exact in zip(got, usual, true, strict=True):
        error, allowed = ((t.double() - exact).norm() for t in (mine, theirs))
        assert error <= 2 * allowed


def rotations(tokens: int, count: int) -> tuple[Tensor, Tensor]:
    angle = normal(1, tokens, 1, count, seed=1)
    return angle.cos(), angle.sin()


def assert_codes(parts, weights, cos, sin, interleaved, *, eps=EPS) -> None:
    given = parts, weights, eps, cos, sin, interleaved
    (got, scale), (want, want_scale) = into_fp8(*given), reference.codes(*given)
    assert got.dtype == torch.float8_e4m3fn and got.shape == want.shape and got.is_contiguous()
    assert torch.equal(scale, want_scale)
    off, size = (got.float() - want.float()).abs(), want.float().abs()
    # 16 bits stand between the two halves of the rotation.
    assert (off != 0).float().mean() < 0.1
    assert (off <= 0.13 * size + 0.02 * size.square().mean().sqrt()).all()


@FP8
@DTYPES
@PAIRS
@pytest.mark.parametrize("count", [1, 2], ids=["pair", "channel"])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_codes_of_heads_and_tables(dim, count, interleaved, dtype, empty_is):
    weight = (1 + 0.3 * normal(dim)).to(dtype)
    cos, sin = rotations(519, dim // 2 * count)
    with empty_is(255):
        assert_codes([wide(519, 7, dim, dtype)], [weight], [cos], [sin], interleaved)
        assert_codes([wide(519, 7, dim, dtype)], [None], [None], [None], interleaved)


@FP8
@PAIRS
def test_codes_of_text_and_image_and_of_norms_over_all_heads(interleaved, empty_is):
    bf16 = torch.bfloat16
    parts = [wide(tokens, 24, 128, bf16) for tokens in (77, 1024)]
    weights = [((1 + 9 * i) * (1 + 0.3 * normal(128, seed=i))).to(bf16) for i in range(2)]
    with empty_is(255):
        assert_codes(parts, weights, *([t] for t in rotations(1101, 128)), interleaved)
        weight = (1 + 0.3 * normal(40 * 128)).to(bf16)
        pairs = ([t] for t in rotations(300, 64))
        assert_codes([wide(300, 40, 128, bf16)], [weight], *pairs, interleaved)


@FP8
@PAIRS
def test_bad_numbers_show_in_codes(interleaved):
    x, (cos, sin) = wide(300, 6, 64, torch.bfloat16).clone(), rotations(300, 32)
    x[0, 7, 2, 5], x[0, 8, 2, 5], cos[0, 20] = torch.nan, torch.inf, 10
    got = into_fp8([x], [None], EPS, [cos], [sin], interleaved)[0].float()
    assert got[0, 7:9, 2].isnan().all() and got[:, 20].isnan().all()
    got[0, 7:9, 2] = got[:, 20] = 0
    assert got.isfinite().all()


@FP8
def test_no_tokens_and_a_million_rows_in_codes():
    parts = [wide(n, 40, 128, torch.bfloat16, batch=1) for n in (0, 33000)]
    cos, sin = rotations(33000, 64)
    weights = [None, None]
    assert_codes(parts, weights, [cos[:, :0], cos], [sin[:, :0], sin], True)
