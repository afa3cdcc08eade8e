"""Every family's blocks: as many norms and rotations are found as it has, and the result is right.

The rule for accuracy: an error against float64 at most twice that of the unfused graph.
"""

from typing import Any

import pytest
import torch
from rewritten import assert_near, compiled, wide
from tiny_families import TINY
from torch import Tensor, nn
from torch.utils._pytree import tree_map

BF16 = torch.bfloat16
TABLE = 32
"""Channels of a head: rotary tables have no more, and stay as they are, as diffusers keeps them."""

BLOCKS = {
    "flux": {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2},
    "flux2": {"Flux2TransformerBlock": 2, "Flux2SingleTransformerBlock": 2},
    "pixart": {"BasicTransformerBlock": 0},
    "sana": {"SanaTransformerBlock": 0},
    "sd3": {"JointTransformerBlock": 4},  # the first block's second attention has its own
    "qwen_image": {"QwenImageTransformerBlock": 2},
    "z_image": {"ZImageTransformerBlock": 2},
    "wan": {"WanTransformerBlock": 2},  # its cross-attention is normed only, over all heads
}


def tiny_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    tiny = TINY[name]
    inputs = tiny.inputs()
    if name == "flux":
        del inputs["guidance"]
    return tiny.build(), inputs


@pytest.fixture(params=BLOCKS)
def blocks(request) -> list[tuple[nn.Module, Any, Any, int]]:
    """The first block of each class that a family repeats, with what it is called with."""
    wanted = BLOCKS[request.param]
    model, inputs = tiny_model(request.param)
    seen: dict[str, tuple[nn.Module, Any, Any]] = {}

    def keep(block: nn.Module, args: Any, kwargs: Any) -> None:
        seen.setdefault(type(block).__name__, (block, args, kwargs))

    hooks = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for module in model.modules()
        if type(module).__name__ in wanted
    ]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return [(*call, wanted[name]) for name, call in seen.items()]


@torch.no_grad()
def test_blocks_of_every_family(blocks):
    def rounded(value: Any) -> Any:
        rows = isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1] > TABLE
        return value.to(BF16) if rows else value

    assert blocks
    for block, args, kwargs, count in blocks:
        args, kwargs = tree_map(rounded, (args, kwargs))
        true = block.double()(*tree_map(wide, args), **tree_map(wide, kwargs))
        block.to(BF16)
        usual = block(*args, **kwargs)
        call, backend = compiled(type(block).forward)
        assert_near(call(block, *args, **kwargs), usual, true)
        assert backend.counts == [count]


@torch.no_grad()
def test_text_and_image_are_one_call():
    """FLUX's tables are of all tokens, Qwen-Image's of each part."""
    for name, tables in (("flux", 1), ("qwen_image", 2)):
        model, inputs = tiny_model(name)
        block = model.transformer_blocks[0]
        block.forward, backend = compiled(block.forward)
        model(**inputs)
        for parts, weights, eps, cos, sin, interleaved in backend.calls:
            assert (len(parts), len(cos), len(sin)) == (2, tables, tables)
            assert "added" in weights[0].name and "added" not in weights[1].name
            assert (eps, interleaved) == (1e-6, True)
