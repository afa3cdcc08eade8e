"""Torch's attention sent to ours, from eager code and graphs: only what ours can replace."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dirotq.kernels.attention import redirect
from dirotq.kernels.attention.redirect import OPERATOR, Redirect, ours, plain, replace


def qkv(T: int = 40, S: int = 50, H: int = 3, d: int = 32) -> list[Tensor]:
    """[B, H, tokens, d], as diffusers transposes them."""
    g = torch.Generator().manual_seed(T + S)
    return [torch.randn(2, n, H, d, generator=g).transpose(1, 2) for n in (T, S, S)]


@pytest.fixture
def sent(monkeypatch) -> list[str]:
    """Modes of the calls that came to ours, which tell a number that torch's would not."""
    modes: list[str] = []

    def told(q, k, v, mask, scale, mode):
        modes.append(mode)
        return torch.full_like(q, 7.0)

    monkeypatch.setattr(redirect, "OPERATOR", told)
    return modes


CALLS = {
    "plain": ({}, True),
    "as diffusers calls": (
        {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}, True,
    ),
    "scale": ({"scale": 0.3}, True),
    "mask": ({"attn_mask": torch.ones(40, 50, dtype=torch.bool)}, False),
    "causal": ({"is_causal": True}, False),
    "dropout": ({"dropout_p": 0.1}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_which_calls(name, sent):
    kwargs, taken = CALLS[name]
    q, k, v = qkv()
    assert plain(q, k, v, **kwargs) == taken
    with Redirect("fp8"):
        y = F.scaled_dot_product_attention(query=q, key=k, value=v, **kwargs)
    assert sent == ["fp8"] * taken
    assert bool((y == 7).all()) == taken


def test_shared_keys_of_several_heads_are_torchs(sent):
    q, k, v = qkv()
    with Redirect("exact"):
        F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert sent == ["exact"]


@pytest.mark.parametrize("change", ["three axes", "batch", "width of v", "meta"])
def test_other_shapes_and_devices_are_torchs(change):
    q, k, v = qkv()
    if change == "three axes":
        q, k, v = q[0], k[0], v[0]
    elif change == "batch":
        k, v = k[:1], v[:1]
    elif change == "width of v":
        v = v[..., :16]
    else:
        q, k, v = (t.to("meta") for t in (q, k, v))
    assert not plain(q, k, v)


def test_gradients_are_torchs(sent):
    q, k, v = (t.requires_grad_() for t in qkv())
    with Redirect("exact"):
        y = F.scaled_dot_product_attention(q, k, v)
        y.sum().backward()
        assert q.grad is not None
        assert sent == []
        with torch.no_grad():
            F.scaled_dot_product_attention(q, k, v)
    assert sent == ["exact"]


def test_a_chosen_backend_is_obeyed(sent):
    q, k, v = qkv()
    with Redirect("exact"), sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, k, v)
    assert sent == []


def test_autocast_is_torchs(sent):
    with Redirect("exact"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.scaled_dot_product_attention(*qkv()).dtype == torch.bfloat16
    assert sent == []


def test_other_functions_and_the_outside_are_left_alone(sent):
    q, k, v = qkv()
    with Redirect("fp8"):
        assert torch.equal(torch.relu(q), q.clamp_min(0))
    F.scaled_dot_product_attention(q, k, v)
    assert sent == []
    assert (ours(q, k, v, scale=0.2, mode="exact") == 7).all()


def test_values_are_torchs_and_flatten_for_free():
    q, k, v = qkv()
    want = F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.3)
    with Redirect("exact"):
        y = F.scaled_dot_product_attention(q, k, v, None, 0.0, False, scale=0.3)
    torch.testing.assert_close(y, want)
    assert y.transpose(1, 2).flatten(2).data_ptr() == y.data_ptr()


def graph_of(function, *args: Tensor) -> torch.fx.GraphModule:
    found = []

    def backend(module, inputs):
        found.append(module)
        return module

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    return found[0]


def targets(module: torch.fx.GraphModule) -> list[object]:
    return [node.target for node in module.graph.nodes]


def test_graphs():
    def block(q, k, v, mask):
        x = F.scaled_dot_product_attention(q, k, v)
        x = F.scaled_dot_product_attention(query=x, key=k, value=v, attn_mask=None, scale=0.3)
        return F.scaled_dot_product_attention(x, k, v, attn_mask=mask)

    args = (*qkv(), torch.ones(40, 50, dtype=torch.bool))
    module = graph_of(block, *args)
    with torch.no_grad():
        assert replace(module.graph, "exact") == 2
        module.recompile()
        assert targets(module).count(OPERATOR) == 2
        torch.testing.assert_close(module(*args)[0], block(*args))
        assert [n.args[4:] for n in module.graph.nodes if n.target is OPERATOR] == [
            (None, "exact"), (0.3, "exact"),
        ]  # fmt: skip


def test_graphs_with_a_chosen_backend():
    def block(q, k, v):
        with sdpa_kernel(SDPBackend.MATH):
            x = F.scaled_dot_product_attention(q, k, v)
        return F.scaled_dot_product_attention(x, k, v)

    module = graph_of(block, *qkv())
    with torch.no_grad():
        assert replace(module.graph, "exact") == 1
    order = [t for t in targets(module) if t in (OPERATOR, F.scaled_dot_product_attention)]
    assert order == [F.scaled_dot_product_attention, OPERATOR]


def test_graphs_that_want_gradients():
    q, k, v = (t.requires_grad_() for t in qkv())
    module = graph_of(F.scaled_dot_product_attention, *(t.detach() for t in (q, k, v)))
    for node in module.graph.nodes:
        if "example_value" in node.meta:
            node.meta["example_value"].requires_grad_()
    assert replace(module.graph, "exact") == 0


@pytest.mark.parametrize("mode", ["exact", "fp8"])
def test_the_operator_keeps_its_promises(mode):
    """Schema, fake tensors and dynamo; strides too."""
    q, k, v = qkv()
    torch.library.opcheck(OPERATOR, (q, k, v, None, 0.2, mode))
    mask = torch.rand(2, 1, 40, 50) > 0.3
    torch.library.opcheck(OPERATOR, (q.contiguous(), k, v, mask, None, mode))
