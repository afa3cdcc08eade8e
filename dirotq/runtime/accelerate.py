"""How a packed transformer runs: compiled blocks, CUDA graphs, which attention.

All of it can be turned off, and then every module runs alone, as diffusers wrote it.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from dirotq.errors import ConfigError
from dirotq.kernels.attention import MODES, Mode

from .compiled import compile_blocks, uncompile_blocks
from .graph_watch import RUNTIME
from .graphs import graph_forward, ungraph_forward


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a packed transformer may do to be fast; the defaults are what measured fastest without
    changing an image by more than another batch size does (docs/speed.md)."""

    compile: bool = True
    """Compile the repeated blocks, with norms, activations and attention fused around the packed
    linears' kernels. The first call takes longer; the compiler keeps its work on disk."""
    graphs: bool = True
    """Replay a whole forward as one CUDA graph, where weights stay where they are."""
    attention: Mode = "exact"
    """``fp8`` multiplies 8-bit queries, keys and values, which is another approximation. Another
    backend that diffusers was told to use wins over either."""

    def __post_init__(self) -> None:
        for name in ("compile", "graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r:.60}; use True or False")
        if self.attention not in MODES:
            raise ConfigError(
                f"attention {self.attention!r} is unknown; use 'exact' (16 bits) or 'fp8'"
            )


PLAIN = Runtime(compile=False, graphs=False)
"""Every module alone."""


def runtime_of(transformer: nn.Module) -> Runtime:
    """Tell how a packed transformer runs."""
    return getattr(transformer, RUNTIME, None) or PLAIN


def accelerate(model: Any, **changes: Any) -> Any:
    """Set how a packed model runs, in place, and return it.

    model    a pipeline with a packed transformer, or that transformer
    changes  fields of :class:`Runtime`: ``compile``, ``graphs``, ``attention``

    Raises ConfigError for a field or value that does not exist, or a model without a transformer.
    """
    transformer = model if isinstance(model, nn.Module) else getattr(model, "transformer", None)
    for other in getattr(model, "components", {}).values():
        if type(other) is type(transformer) and other is not transformer:
            accelerate(other, **changes)
    if not isinstance(transformer, nn.Module):
        raise ConfigError(
            f"a {type(model).__name__} has no transformer to accelerate; give a pipeline that has "
            "one, or the transformer itself"
        )
    known = [f.name for f in fields(Runtime)]
    if unknown := set(changes) - set(known):
        raise ConfigError(
            f"a runtime has no {', '.join(sorted(unknown))}; it has {', '.join(known)}"
        )
    runtime = replace(runtime_of(transformer), **changes)
    setattr(transformer, RUNTIME, runtime)
    if changes.keys() & {"compile", "attention"}:
        uncompile_blocks(transformer)
        if runtime.compile or runtime.attention != "exact":
            compile_blocks(transformer, attention=runtime.attention, compiled=runtime.compile)
    if "graphs" in changes:
        (graph_forward if runtime.graphs else ungraph_forward)(transformer)
    return model
