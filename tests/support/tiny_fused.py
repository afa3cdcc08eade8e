"""Tiny transformers of the families that run fused, their sites swapped, and calls of them."""

from typing import Any

import torch
from tiny_families import TINY
from tiny_packed import packed
from tiny_spec import tiny_spec
from torch import Tensor, nn

from dirotq.kernels.linear import QuantLinear
from dirotq.models.call import Call
from dirotq.models.families import family_of
from dirotq.models.family import ModelFamily
from dirotq.packed.swap import swap_sites

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "flux": ("flux", {"guidance_embeds": True}),
    "pixart": ("pixart", {}),
    "sana": ("sana", {}),
    "sana-sprint": ("sana", {"qk_norm": "rms_norm_across_heads"}),
    "sd3.5": ("sd3", {}),
    "sd3": ("sd3", {"dual_attention_layers": (), "qk_norm": None}),
}
WHOLE = slice(None)
IMAGES = 3


class Wide(nn.Module):
    """A site's linears stacked, unquantized; notes which rows each call asked for."""

    def __init__(self, linears: list[Any]) -> None:
        super().__init__()
        weights = [linear.weight.detach().flatten(1) for linear in linears]
        self.weight = nn.Parameter(torch.cat(weights))
        biased = linears[0].bias is not None
        biases = [linear.bias.detach() for linear in linears] if biased else [torch.zeros(0)]
        self.bias = nn.Parameter(torch.cat(biases)) if biased else None
        self.calls: list[tuple[int, int]] = []

    def forward(self, x: Tensor, rows: slice = WHOLE) -> Tensor:
        self.calls.append(rows.indices(len(self.weight))[:2])
        bias = None if self.bias is None else self.bias[rows]
        return nn.functional.linear(x, self.weight[rows], bias)


def original(name: str, **changes: Any) -> Any:
    key, config = VARIANTS[name]
    return TINY[key].build(**config | changes).eval()


def stack(network: Any) -> Any:
    """Swap every site for a Wide of its linears."""
    linear = network.get_submodule
    wide = lambda site: Wide([linear(c) for c in site.linears])  # noqa: E731
    swap_sites(network, family(network).sites(network), wide)
    return network


def quantize(network: Any) -> Any:
    """Swap every site for a packed linear with random content."""

    def build(site: Any) -> QuantLinear:
        made = packed(tiny_spec(dim=site.in_features, rows=site.out_features), bias=True)
        made.wscale.mul_(0.3)
        made.bias = made.bias if site.bias else None
        return made

    swap_sites(network, family(network).sites(network), build)
    return network


def family(network: Any) -> ModelFamily:
    return family_of(type(network).__name__)


def inputs(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Three images of 15 tokens (FLUX: 9); text masked to different lengths."""
    key = VARIANTS[name][0]
    draw = torch.Generator().manual_seed(0)
    sizes = {"pixart": (4, 6, 10), "sana": (4, 3, 5), "sd3": (4, 6, 10)}

    def more(tensor: Tensor) -> Tensor:
        if len(tensor) != 2 or not tensor.is_floating_point():
            return tensor
        return torch.randn(IMAGES, *tensor.shape[1:], generator=draw).to(dtype)

    given = Call((), TINY[key].inputs()).map(more).kwargs
    if key in sizes:
        given["hidden_states"] = torch.randn(IMAGES, *sizes[key], generator=draw).to(dtype)
    scale = 1 if key == "flux" else 1000
    given["timestep"] = (torch.tensor([0.3, 0.8, 0.5], dtype=dtype) * scale).to(
        dtype if key == "flux" else torch.long
    )
    if "encoder_attention_mask" in given:
        given["encoder_attention_mask"] = (
            torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
        ).long()
    return given


def call(network: Any, name: str, dtype: torch.dtype = torch.float64, **more: Any) -> Tensor:
    with torch.no_grad():
        return network(**inputs(name, dtype), return_dict=False, **more)[0]


def blocks(network: Any) -> list[Any]:
    return [*network.transformer_blocks, *getattr(network, "single_transformer_blocks", [])]


def fallen(network: Any) -> list[int]:
    """Indices of the blocks that will have run unfused; filled by later calls."""
    found: list[int] = []
    for i, block in enumerate(blocks(network)):

        def unfused(*args: Any, i: int = i, forward: Any = block._dirotq_unfused) -> Any:
            found.append(i)
            return forward(*args)

        block._dirotq_unfused = unfused
    return found


def off(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()
