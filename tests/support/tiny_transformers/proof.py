"""What is packed of a class, and the proof that its network stays what it was."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import flex_attention
from torch.utils._pytree import tree_leaves

from dirotq.models.call import Call
from dirotq.models.discovery import ACROSS, Discovered, discover
from dirotq.models.families import known_family
from dirotq.models.family import Site, is_linear
from dirotq.models.skeleton import empty_transformer

BY_TABLE = "the family table says so"


def found(network: Any, inputs: dict[str, Any]) -> Discovered:
    """Find the sites of a network as `compress` does: without its weights."""
    if (family := known_family(type(network).__name__)) is not None:
        every = family.sites(network)
        # Keys and values of the text, which only method.text_group packs.
        sites = [site for site in every if site.kind == "block" or not site.text]
        text = {linear for site in every if site not in sites for linear in site.linears}
        packed = {linear for site in sites for linear in site.linears}
        linears = [name for name, module in network.named_modules() if is_linear(module)]
        left = [name for name in linears if name not in packed]
        return Discovered(sites, {n: ACROSS if n in text else BY_TABLE for n in left})
    call = Call((), inputs).map(lambda t: t.float() if t.is_floating_point() else t)
    return discover(empty_transformer(dict(network.config), type(network)), (), call.kwargs)


def output(network: Any, inputs: dict[str, Any]) -> Tensor:
    """Return everything that a call returns, in a row."""
    with torch.no_grad(), _eager_flex_attention():
        # A cache among the arguments is written to.
        made = network(**copy.deepcopy(inputs))
    parts = list(made.values()) if hasattr(made, "keys") else [made]
    tensors = [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]
    return torch.cat([tensor.flatten().double() for tensor in tensors])


def apart(got: Tensor, want: Tensor) -> float:
    """Return the relative error of an output."""
    return float((got - want).norm() / want.norm())


def closed(network: nn.Module, sites: list[Site]) -> None:
    """Take the main branch's weights away from fused sites."""
    for site in sites:
        nn.init.zeros_(network.get_submodule(site.name).main)  # type: ignore[arg-type]


@contextmanager
def _eager_flex_attention() -> Iterator[None]:
    """Keep flex attention from compiling itself, which takes seconds."""
    before = flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        yield
    finally:
        flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before
