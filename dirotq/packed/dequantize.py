"""A packed transformer back in 16 bits: ``transformer.dequantize()`` of diffusers."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from dirotq.errors import UnsupportedError
from dirotq.kernels.linear import QuantLinear
from dirotq.models.family import Site
from dirotq.models.skeleton import empty_transformer
from dirotq.packed.adapters import has_adapters


def dequantize_sites(transformer: Any, sites: Iterable[Site]) -> None:
    """Put linears with the weights that the packed ones stand for in their places.

    What was rounded stays rounded; activations are not rounded any more. The linears have the
    dtype of the transformer's 16-bit parts.

    Raises UnsupportedError while a site is offloaded, or an adapter holds it.
    """
    made = list(sites)
    if has_adapters(transformer):
        raise UnsupportedError(
            "adapters are loaded, which a transformer in 16 bits would lose: unload them "
            "(pipeline.unload_lora_weights()), or fuse them first (pipeline.fuse_lora()) and then "
            "unload them"
        )
    for site in made:
        wide = transformer.get_submodule(site.name)
        if not isinstance(wide, QuantLinear) or wide.qweight.is_meta:
            what = "is offloaded" if isinstance(wide, QuantLinear) else f"is {type(wide).__name__}"
            raise UnsupportedError(
                f"{site.name} {what}, so it can't be dequantized now: take off hooks "
                "(pipeline.remove_all_hooks()) and adapters (pipeline.unload_lora_weights()) first"
            )
    skeleton, dtype = empty_transformer(transformer.config, type(transformer)), transformer.dtype
    for site in made:
        wide = transformer.get_submodule(site.name)
        weight, bias = wide.weight, wide.bias
        _remove(transformer, site.name)
        for name, rows in site.slices():
            linear: Any = skeleton.get_submodule(name)
            linear.weight = _plain(weight[rows].view(linear.weight.shape).to(dtype))
            if bias is not None:
                linear.bias = _plain(bias[rows].to(dtype))
            parent, _, leaf = name.rpartition(".")
            transformer.get_submodule(parent).add_module(leaf, linear.train(transformer.training))


def _plain(tensor: Any) -> nn.Parameter:
    return nn.Parameter(tensor.clone(), requires_grad=False)


def _remove(root: nn.Module, path: str) -> None:
    parent, _, leaf = path.rpartition(".")
    delattr(root.get_submodule(parent), leaf)
