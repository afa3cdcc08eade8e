"""Modules of a network whose state a forward goes by."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from dirotq.kernels.linear import PointwiseView, QuantLinear, SiteView


def own_modules(network: nn.Module) -> Iterator[nn.Module]:
    """Yield ``network.modules()``, without what adapters of packed linears hold.

    A packed linear goes by what was made of its adapters (kernels/updates.py). peft keeps ten
    modules per linear for them: looking at each takes milliseconds.
    """
    seen: set[nn.Module] = set()
    left: list[Any] = [network]
    while left:
        module = left.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        yield module
        children = module._modules
        left += [children["base_layer"]] if adapts_packed(module) else reversed(children.values())


def adapts_packed(module: nn.Module) -> bool:
    """Tell whether a module is peft's layer around a packed linear."""
    base = module._modules.get("base_layer")
    return hasattr(type(module), "adapter_layer_names") and isinstance(
        base, QuantLinear | SiteView | PointwiseView
    )
