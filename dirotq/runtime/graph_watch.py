"""What a recorded forward relies on besides its arguments, looked up before every replay.

A CUDA graph reads weights at the addresses they had and repeats what Python decided then. Looking
is cheap: dictionaries are gathered once, a call compares their content.
"""

from itertools import chain
from types import MethodType
from typing import Any

import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dirotq.kernels.linear import QuantLinear

from .compiled import CompiledForward
from .own_modules import adapts_packed, own_modules

RUNTIME = "_dirotq_runtime"
"""Attribute of a transformer: anything hashable, graphs don't outlive its change."""
ADAPTER = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
"""Attributes of peft's layers that its Python decides by; weights of adapters are submodules'.
Packed linears go by what their updates amount to (own_modules.py)."""


class Watch:
    """Where a network keeps its tensors, children, hooks and attention processors."""

    def __init__(self, network: nn.Module, before: "Watch | None" = None) -> None:
        """before: an earlier watch, whose replaced forwards stay the ones that are known."""
        modules = list(own_modules(network))
        known: dict[nn.Module, Any] = {} if before is None else before.known
        self.network = network
        self.known: dict[nn.Module, Any] = {
            m: known.get(m, vars(m).get("forward")) for m in modules
        }
        self.states = [vars(m) for m in modules]
        self.tensors: list[dict[str, Any]] = [
            held for m in modules for held in (m._parameters, m._buffers) if held
        ]
        self.children = [m._modules for m in modules if m._modules]
        # The network's own hooks run around its forward, with or without a graph.
        self.hooks = [
            hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)
        ]
        self.attentions = [m for m in modules if hasattr(m, "processor")]
        self.adapters = [
            vars(m)
            for m in modules
            if hasattr(type(m), "adapter_layer_names") and not adapts_packed(m)
        ]
        self.updated = [
            (m, m.updates) for m in modules if isinstance(m, QuantLinear) and m.updates is not None
        ]
        self.blocks = [vars(b) for m in modules if isinstance(m, nn.ModuleList) for b in m]
        parameters = (t for m in modules for t in m.parameters(False) if t.is_floating_point())
        self.sample = next(parameters, None)
        self._judged: tuple[list[Any], str | None] | None = None

    def token(self) -> Any:
        """Equal to an earlier one as long as graphs recorded then are still right.

        Addresses of weights, their dtype, submodules, replaced forwards, compiled blocks, attention
        processors with their backends, what adapters are set to, and RUNTIME. Packed linears whose
        adapters are set otherwise write their directions anew first, where graphs read them.
        """
        for linear, updates in self.updated:
            if updates.stale():
                linear.renew()
        tensors = chain.from_iterable(held.values() for held in self.tensors)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        return (
            addresses,
            None if self.sample is None else self.sample.dtype,
            [list(children.values()) for children in self.children],
            self._forwards(),
            [block.get("_compiled_call_impl") for block in self.blocks],
            [_attention(module) for module in self.attentions],
            [_set_to(state.get(name)) for state in self.adapters for name in ADAPTER],
            [updates.stamp() for _, updates in self.updated],
            getattr(self.network, RUNTIME, None),
        )

    def obstacle(self) -> str | None:
        """Say why this network can't be recorded as it is now; None if it can."""
        if any(self.hooks) or _has_any_global_hook():
            return "its modules have forward hooks"
        # Offloading and caches put a forward of their own on a module: nothing new, same verdict.
        forwards = self._forwards()
        if self._judged is None or self._judged[0] != forwards:
            self._judged = forwards, self._foreign(forwards)
        return self._judged[1]

    def _forwards(self) -> list[Any]:
        return [state.get("forward") for state in self.states]

    def _foreign(self, forwards: list[Any]) -> str | None:
        for state in self.states:
            if "_hf_hook" in state:
                return "accelerate's hooks move its weights"
            if getattr(state.get("_diffusers_hook"), "hooks", None):
                return "diffusers' hooks offload, cache or cast in it"
        for (module, before), now in zip(self.known.items(), forwards):
            allowed = (None, before, MethodType(type(module).forward, module))
            known = now in allowed or isinstance(now, CompiledForward)
            # Around the network's own forward others may do what they like.
            if module is not self.network and not known:
                return f"the forward of a {type(module).__name__} was replaced"
        return None


def runtime_modes() -> tuple[Any, ...]:
    """Switches of torch and diffusers that choose other kernels; part of a graph's key."""
    cuda = torch.backends.cuda
    return (
        _AttentionBackendRegistry._active_backend,
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _attention(module: Any) -> tuple[Any, ...]:
    processor = getattr(module, "processor", None)
    backend = getattr(processor, "_attention_backend", None)
    scale = _set_to(getattr(processor, "scale", None))  # of an IP-adapter's images
    return processor, backend, scale, getattr(module, "fused_projections", None)


def _set_to(value: Any) -> Any:
    """Copy what is changed in place."""
    if isinstance(value, dict):
        return [(name, _set_to(item)) for name, item in value.items()]
    if isinstance(value, list):
        return [_set_to(item) for item in value]
    return value.data_ptr() if isinstance(value, Tensor) else value
