"""Whether modules are still what diffusers and the swap of sites made of them.

Compiled code does several modules' work in one kernel and calls none of them. It may do so only as
long as nobody counts on the calls: offloading brings weights in by them (accelerate and diffusers
replace the ``forward`` of an object), caches and layer skipping answer in their place, and users'
hooks watch them.
"""

from dataclasses import dataclass
from types import MethodType

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


@dataclass(frozen=True, slots=True)
class Made:
    """A module with all that lies below it, as they were once; a deep copy tells of the copy."""

    modules: tuple[nn.Module, ...]
    classes: tuple[type, ...]
    children: tuple[tuple[nn.Module | None, ...], ...]

    @classmethod
    def now(cls, root: nn.Module) -> "Made":
        """Take down what a module is made of."""
        modules = tuple(root.modules())
        children = tuple(tuple(module._modules.values()) for module in modules)
        return cls(modules, tuple(map(type, modules)), children)

    def inside(self) -> bool:
        """Tell whether below the module all are the same, and every call of one is its class's
        forward and nothing else. What wraps the module itself runs whatever it does inside."""
        if _has_any_global_hook() or tuple(map(type, self.modules)) != self.classes:
            return False
        for module, children in zip(self.modules, self.children):
            if children and tuple(module._modules.values()) != children:
                return False
        return all(map(_own, self.modules[1:]))


def _own(module: nn.Module) -> bool:
    state = vars(module)
    if state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return False
    forward = state.get("forward")
    # Who takes a hook off leaves the bound method on the object.
    return forward is None or forward == MethodType(type(module).forward, module)
