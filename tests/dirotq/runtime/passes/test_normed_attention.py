"""Attention in FP8 and what norms its queries and keys become one call, and nothing else does.

The rule for accuracy: as near to exact attention as codes that are made of q, k and v at leisure.
"""

from typing import Any

import pytest
import torch
from tiny_families import TINY
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from dirotq.kernels.attention import flash3, normed, redirect
from dirotq.kernels.fp8_qkv import attention as at_leisure
from dirotq.kernels.norm_rope import norm_rope
from dirotq.runtime.passes import norm_rope as norms
from dirotq.runtime.passes import normed_attention
from dirotq.runtime.passes.normed_attention import OPERATOR, rewrite

BATCH, TOKENS, HEADS, DIM = 2, 40, 3, 32


class Backend:
    """Runs graphs as they stand after our passes; counts what this one found."""

    def __init__(self, mode: Any = "fp8", *, anywhere: bool = True) -> None:
        self.mode, self.anywhere = mode, anywhere
        self.count = 0

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        norms.rewrite(module, anywhere=True)
        redirect.replace(module.graph, self.mode)
        self.count += rewrite(module, anywhere=self.anywhere)
        module.graph.lint()
        module.recompile()
        assert len(module.graph.find_nodes(op="call_function", target=OPERATOR)) == self.count
        return module.forward


def compiled(function: Any, backend: Backend) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


BLOCKS = {
    "flux": {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1},
    "flux2": {"Flux2TransformerBlock": 1, "Flux2SingleTransformerBlock": 1},
    "pixart": {"BasicTransformerBlock": 0},
    "sd3": {"JointTransformerBlock": 2},
    "qwen_image": {"QwenImageTransformerBlock": 0},  # two prompts of two lengths: a mask
    "z_image": {"ZImageTransformerBlock": 1},
    "wan": {"WanTransformerBlock": 1},
}


@torch.no_grad()
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_every_family(name):
    model, inputs = TINY[name].build(), TINY[name].inputs()
    if name == "flux":
        del inputs["guidance"]
    seen: dict[str, Any] = {}

    def keep(block: nn.Module, args: Any, kwargs: Any) -> None:
        seen.setdefault(type(block).__name__, (block, args, kwargs))

    for module in model.modules():
        if type(module).__name__ in BLOCKS[name]:
            module.register_forward_pre_hook(keep, with_kwargs=True)
    model(**inputs)
    for kind, (block, args, kwargs) in seen.items():
        block._forward_pre_hooks.clear()
        want = tree_leaves(block(*args, **kwargs))
        backend = Backend()
        got = tree_leaves(compiled(block, backend)(*args, **kwargs))
        assert backend.count == BLOCKS[name][kind], kind
        for mine, true in zip(got, want, strict=True):
            assert (mine.dtype, mine.shape) == (true.dtype, true.shape)
            assert (mine - true).norm() <= 0.05 * true.norm()


def given(seed: int = 0) -> tuple[Tensor, ...]:
    """q, k, v [B, T, H D] in columns of one tensor, a weight, cos and sin of neighbours."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    qkv = normal(BATCH, TOKENS, 3 * HEADS * DIM).chunk(3, -1)
    angle = normal(1, TOKENS, 1, DIM // 2)
    return (*qkv, 1 + 0.3 * normal(DIM), angle.cos(), angle.sin())


def turned(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = F.rms_norm(x.unflatten(-1, (HEADS, DIM)), (DIM,), w, 1e-6)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)


def attended(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **more).transpose(1, 2).flatten(2)


def plain(q, k, v, w, cos, sin):
    v = v.unflatten(-1, (HEADS, DIM))
    return attended(turned(q, w, cos, sin), turned(k, w, cos, sin), v)


def permuted(q, k, v, w, cos, sin):
    q, k, v = (
        t.permute(0, 2, 1, 3)
        for t in (turned(q, w, cos, sin), turned(k, w, cos, sin), v.unflatten(-1, (HEADS, DIM)))
    )
    return F.scaled_dot_product_attention(q, k, v, scale=0.1).permute(0, 2, 1, 3).flatten(2)


def read_for_its_dtype(q, k, v, w, cos, sin):
    q = turned(q, w, cos, sin)
    y = attended(q, turned(k, w, cos, sin), v.unflatten(-1, (HEADS, DIM)))
    return y.double().type_as(q)


def read_by_another(q, k, v, w, cos, sin):
    k = turned(k, w, cos, sin)
    return attended(turned(q, w, cos, sin), k, v.unflatten(-1, (HEADS, DIM))), k + 1


def keys_as_they_are(q, k, v, w, cos, sin):
    k, v = (t.unflatten(-1, (HEADS, DIM)) for t in (k, v))
    return attended(turned(q, w, cos, sin), k, v)


def written_in_between(q, k, v, w, cos, sin):
    q, k = q * 1, turned(k, w, cos, sin)
    y = turned(q, w, cos, sin)
    q.mul_(2)
    return attended(y, k, v.unflatten(-1, (HEADS, DIM))), q


def masked(q, k, v, w, cos, sin):
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    v = v.unflatten(-1, (HEADS, DIM))
    return attended(turned(q, w, cos, sin), turned(k, w, cos, sin), v, attn_mask=mask)


def only_turned(q, k, v, w, cos, sin):
    """Without a norm nothing bounds the numbers."""
    k, v = (t.unflatten(-1, (HEADS, DIM)) for t in (k, v))
    first, second = k.unflatten(-1, (-1, 2)).unbind(-1)
    k = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    return attended(turned(q, w, cos, sin), k, v)


@torch.no_grad()
@pytest.mark.parametrize(
    "function", [plain, permuted, read_for_its_dtype], ids=lambda f: f.__name__
)
def test_queries_keys_and_attention_become_one_call(function):
    backend = Backend()
    got, want = compiled(function, backend)(*given()), function(*given())
    assert backend.count == 1
    assert 0 < (got - want).norm() <= 0.06 * want.norm()


LEFT = [read_by_another, keys_as_they_are, written_in_between, masked, only_turned]


@torch.no_grad()
@pytest.mark.parametrize("function", LEFT, ids=lambda f: f.__name__)
def test_what_is_left_alone(function):
    backend = Backend()
    got, want = (tree_leaves(f(*given())) for f in (compiled(function, backend), function))
    assert backend.count == 0
    for mine, true in zip(got, want, strict=True):
        assert (mine - true).norm() <= 0.06 * true.norm()


@torch.no_grad()
def test_exact_attention_stays_exact():
    backend = Backend("exact")
    torch.testing.assert_close(compiled(plain, backend)(*given()), plain(*given()))
    assert backend.count == 0


@torch.no_grad()
@pytest.mark.parametrize("reason", [None, "not installed"])
def test_without_flash_attention_3_the_graph_stays(reason, monkeypatch):
    monkeypatch.setattr(flash3, "why_not", lambda *_, **__: reason)
    backend = Backend(anywhere=False)
    compiled(plain, backend)(*given())
    assert backend.count == (reason is None)


def arguments(mean: float = 0.0) -> tuple[list[Any], Tensor]:
    q, k, v, w, cos, sin = given()
    q, k, v = (t.unflatten(-1, (HEADS, DIM)) for t in (q, k + mean, v))
    one = [w], 1e-6, [cos], [sin]
    return [[q], *one, [k], *one, True], v


@pytest.mark.parametrize("mean", [0.0, 2.0])
def test_the_operator_loses_as_much_as_codes_made_at_leisure(mean):
    given, v = arguments(mean)
    got = OPERATOR(*given, v.transpose(1, 2), None).transpose(1, 2)
    q, k = norm_rope(*given[:5], True), norm_rope(*given[5:10], True)
    want = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v)))
    want = want.transpose(1, 2)
    usual = at_leisure(q, k, v, scale=DIM**-0.5)
    assert got.shape == v.shape and got.flatten(2).data_ptr() == got.data_ptr()
    assert 0 < (got - want).norm() <= 1.3 * (usual - want).norm()


@pytest.mark.parametrize("why", ["engine", "weights"])
def test_the_operator_is_its_parts_where_it_can_do_no_better(why, monkeypatch):
    given, v = arguments()
    if why == "engine":
        monkeypatch.setattr(normed, "choose", lambda *_: "torch")
    else:
        given[1] = [None]
        given[2] = None
    got = OPERATOR(*given, v.transpose(1, 2), 0.2)
    q, k = norm_rope(*given[:5], True), norm_rope(*given[5:10], True)
    assert torch.equal(
        got, redirect.OPERATOR(*(t.transpose(1, 2) for t in (q, k, v)), None, 0.2, "fp8")
    )


def test_the_engine_is_asked_for_the_tokens_of_all_parts(monkeypatch):
    seen = []
    monkeypatch.setattr(
        normed, "choose", lambda q, k, *_: seen.append((q.shape, k.shape)) or "fp8 reference"
    )
    given, v = arguments()
    (q,), (k,) = given[0], given[5]
    parts = [list(t.split([7, TOKENS - 7], 1)) for t in (q, k)]
    want = OPERATOR(*given, v.transpose(1, 2), None)
    given[0], given[5] = parts
    given[1], given[6] = given[1] * 2, given[6] * 2
    assert torch.equal(OPERATOR(*given, v.transpose(1, 2), None), want)
    assert seen == [((BATCH, TOKENS, HEADS, DIM),) * 2] * 2


def test_the_operator_is_what_it_says_to_a_compiler():
    given, v = arguments()
    torch.library.opcheck(
        OPERATOR, (*given, v.transpose(1, 2), None), test_utils=("test_schema", "test_faketensor")
    )


def test_nothing_else_swaps_heads_and_tokens():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    swaps = {
        ("transpose", 1, 2): True, ("transpose", -2, -3): True, ("transpose", 1, 3): False,
        ("permute", 0, 2, 1, 3): True, ("permute", (0, 2, 1, 3)): True,
        ("permute", 0, 2, 3, 1): False, ("contiguous",): False, ("view", 2, 1): False,
    }  # fmt: skip
    for (name, *rest), want in swaps.items():
        node = graph.call_method(name, (x, *rest))
        assert normed_attention._swaps_heads_and_tokens(node) == want, (name, rest)
