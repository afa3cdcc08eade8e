"""How a packed transformer runs: fused blocks, CUDA graphs, which attention.

All of it can be turned off, and then every module runs alone, as diffusers wrote it.

Letters: B images, T tokens, D channels, N outputs.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dirotq.errors import ConfigError
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.prologue import Prologue
from dirotq.kernels.together import Together

from .as_made import untouched
from .graph_watch import RUNTIME
from .graphs import graph_forward, ungraph_forward

Attention = Literal["exact", "fp8"]


@dataclass(frozen=True, slots=True)
class Runtime:
    """What a packed transformer may do to be fast; the defaults are what measured fastest without
    changing an image by more than another batch size does (docs/speed.md)."""

    fused: bool = True
    """Norms, GELU, rotary embeddings and modulators in or beside the packed linears' kernels."""
    graphs: bool = True
    """Replay a whole forward as one CUDA graph, where weights stay where they are."""
    attention: Attention = "exact"
    """``fp8`` multiplies 8-bit queries, keys and values: another approximation, and on Hopper not
    faster than cuDNN yet. Another backend that diffusers was told to use wins over either."""

    def __post_init__(self) -> None:
        for name in ("fused", "graphs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is {getattr(self, name)!r:.60}; use True or False")
        if self.attention not in get_args(Attention):
            raise ConfigError(
                f"attention {self.attention!r} is unknown; use 'exact' (16 bits) or 'fp8'"
            )


@dataclass(slots=True)
class Shared:
    """What the fused blocks of one transformer have in common."""

    runtime: Runtime = field(default_factory=Runtime)
    modulators: "Modulators | None" = None
    ahead: Sequence[Any] = ()
    """Norms computed for the block that comes next (dirotq/runtime/look_ahead.py)."""


class Modulators:
    """Every block's modulation of one time embedding, computed together when the first asks.

    Remembers the last embedding by identity, until the last block has asked: a network makes a new
    one in each forward.
    """

    def __init__(self, blocks: Sequence[nn.Module], linears: Sequence[Any]) -> None:
        self.blocks, self.linears = tuple(blocks), tuple(linears)
        packed = all(isinstance(linear, QuantLinear) for linear in linears)
        self._together = Together(linears) if packed else None
        self._last: tuple[Tensor, dict[int, Tensor]] | None = None

    def of(self, linear: Any, temb_BD: Tensor) -> Tensor:
        """Compute linear(silu(temb)), [B, N]."""
        last = self._last  # another thread may put its own there meanwhile
        if last is None or last[0] is not temb_BD:
            if self._together is None or not self._rest(temb_BD.device):
                return linear(nn.functional.silu(temb_BD))
            made = self._together(nn.functional.silu(temb_BD))
            last = temb_BD, {id(m): y for m, y in zip(self.linears, made, strict=True)}
            self._last = last
        if linear is self.linears[-1]:
            self._last = None  # nobody else will ask: a CUDA graph's memory would be held for it
        return last[1][id(linear)]

    def known(self, linear: Any, temb_BD: Tensor) -> Tensor | None:
        """:meth:`of`, if it was computed together with the others'."""
        last = self._last
        return None if last is None or last[0] is not temb_BD else last[1].get(id(linear))

    def after(self, block: nn.Module) -> nn.Module | None:
        """Return the block that follows; None after the last one."""
        where = next((i for i, b in enumerate(self.blocks) if b is block), len(self.blocks))
        return self.blocks[where + 1] if where + 1 < len(self.blocks) else None

    def _rest(self, device: torch.device) -> bool:
        """Tell whether all weights lie on the device, and nothing brings them in block by block or
        linear by linear, or watches their calls."""
        return (
            all(linear.qweight.device == device for linear in self.linears)
            and all(type(m) is QuantLinear and untouched(m) for m in self.linears)
            and not any(hooked(block) for block in self.blocks)
        )

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_last": None}  # keyed by what is where in this process

    def __deepcopy__(self, memo: dict[int, Any]) -> "Modulators":
        return Modulators(deepcopy(self.blocks, memo), deepcopy(self.linears, memo))


def hooked(module: nn.Module) -> bool:
    """Tell whether accelerate or diffusers wraps its calls: offloading, caches, layer skipping."""
    state = vars(module)
    # diffusers leaves its registry behind when the last hook goes.
    return "_hf_hook" in state or bool(getattr(state.get("_diffusers_hook"), "hooks", None))


def read(linear: Any, prologue: Prologue) -> Tensor:
    """Compute linear(prologue), [B, T, N]: inside its kernels where it is packed."""
    return linear(prologue if isinstance(linear, QuantLinear) else prologue.value())


def clipped(x: Tensor) -> Tensor:
    """Make infinities of float16 its largest numbers, as some of diffusers' blocks do."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def joined(first_BTD: Tensor, second_BTD: Tensor) -> Tensor:
    """Join to [B, T1 + T2, D]: no copy of what a block before left as neighbouring slices."""
    if torch.compiler.is_compiling() or not _neighbours(first_BTD, second_BTD):
        return torch.cat([first_BTD, second_BTD], dim=1)
    b, t, d = first_BTD.shape
    whole = b, t + second_BTD.shape[1], d
    return first_BTD.as_strided(whole, first_BTD.stride(), first_BTD.storage_offset())


def _neighbours(first: Tensor, second: Tensor) -> bool:
    if first.is_meta or first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr():
        return False
    tokens, step = first.shape[1], first.stride(1)
    images_follow = first.shape[0] == 1 or first.stride(0) >= (tokens + second.shape[1]) * step
    return (
        images_follow
        and first.stride() == second.stride()
        and second.storage_offset() == first.storage_offset() + tokens * step
    )


def runtime_of(transformer: nn.Module) -> Runtime:
    """Tell how a packed transformer runs."""
    return getattr(transformer, RUNTIME, None) or Runtime(graphs=False)


def accelerate(model: Any, **changes: Any) -> Any:
    """Set how a packed model runs, in place, and return it.

    model    a pipeline with a packed transformer, or that transformer
    changes  fields of :class:`Runtime`: ``fused``, ``graphs``, ``attention``

    Raises ConfigError for a field or value that does not exist, or a model without a transformer.
    """
    transformer = model if isinstance(model, nn.Module) else getattr(model, "transformer", None)
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
    shared = getattr(transformer, "_dirotq_shared", None)
    if shared is not None:
        shared.runtime = runtime
    if "graphs" in changes:
        (graph_forward if runtime.graphs else ungraph_forward)(transformer)
    return model
