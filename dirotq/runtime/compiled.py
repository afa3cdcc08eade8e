"""Blocks through ``torch.compile``: one compilation for all blocks of a class, our passes first.

A block is what the network repeats. Compiling it alone (regionally) costs the same at any depth;
its weights are arguments of the compiled code. Hooks around a block run as they did: only its
class's forward is compiled.

A block runs as its class wrote it where nothing can be won or something would go wrong: with
gradients, inside of another compiler, with offloading inside of the block, on a device without
kernels, or after a compilation that failed, which is said once.
"""

import functools
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dirotq.kernels import compile_cache
from dirotq.kernels.attention import Mode
from dirotq.kernels.attention.redirect import Redirect
from dirotq.kernels.chip import capability, say_once, why_reference
from dirotq.kernels.linear import QuantLinear

from .as_made import Made
from .graph_capture import first_line
from .passes import rewritten

log = logging.getLogger(__name__)


def compile_blocks(
    transformer: nn.Module, *, attention: Mode = "exact", compiled: bool = True
) -> None:
    """Let every repeated block that holds a packed linear run compiled, in place.

    A block whose forward somebody has replaced keeps that. Deep copies compile anew.

    attention  how plain calls of torch's attention are computed
    compiled   False: blocks run module by module, and only attention is ours
    """
    compilers: dict[type[Any], Compiler] = {}
    for block in repeated_blocks(transformer):
        if "forward" not in vars(block):
            made = compilers.setdefault(type(block), Compiler(type(block), attention, compiled))
            block.forward = CompiledForward(block, made)


def uncompile_blocks(transformer: nn.Module) -> None:
    """Put the forwards of the blocks' classes back."""
    for block in repeated_blocks(transformer):
        if isinstance(vars(block).get("forward"), CompiledForward):
            del block.forward


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """List the outermost numbered modules that hold packed linears, in order."""
    linears = {n for n, m in transformer.named_modules() if isinstance(m, QuantLinear)}
    names = {_block_of(name) for name in linears} - {""} - linears
    return [m for name, m in transformer.named_modules() if name in names]


def _block_of(path: str) -> str:
    """Return "blocks.3" of "blocks.3.attn.to_q", "" without a number."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: number + 1])


class Compiler:
    """One class's forward, compiled when it is first called: shared by a transformer's blocks."""

    backend: ClassVar[Callable[..., Any] | None] = None
    """None: our passes, then Inductor. Tests, which have no GPU, put another one there."""

    def __init__(
        self, block_class: type[Any], attention: Mode = "exact", enabled: bool = True
    ) -> None:
        self.block_class, self.attention, self.enabled = block_class, attention, enabled
        self.failed = False

    @functools.cached_property
    def call(self) -> Callable[..., Any]:
        """The compiled forward, ``call(block, *args, **kwargs)``.

        Code of its own for every transformer: torch counts compilations by code object, and gives
        up after a few.
        """
        forward = self.block_class.forward
        twin = FunctionType(
            forward.__code__.replace(), forward.__globals__, forward.__name__, forward.__defaults__,
            forward.__closure__,
        )  # fmt: skip
        twin.__kwdefaults__ = forward.__kwdefaults__
        compiled = torch.compile(twin, backend=self.backend or self._inductor)
        # Ranks differ from block to block: the second one makes them symbols for all others.
        return torch._dynamo.config.patch(force_parameter_static_shapes=False)(compiled)

    def _inductor(self, module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        from .whole_rows import whole_rows  # loads Inductor

        name, start = self.block_class.__name__, time.monotonic()
        log.info("compiling %s for this size; the next run finds it on disk", name)
        compile_cache.inductor()
        with whole_rows():
            compiled = torch._inductor.compile(
                rewritten(module, self.attention), list(example_inputs)
            )
        log.info("compiled %s in %.1f s", name, time.monotonic() - start)
        return compiled

    def __getstate__(self) -> dict[str, Any]:
        kept = {"block_class", "attention", "enabled"}  # compiled code is this process's
        return {k: v for k, v in vars(self).items() if k in kept} | {"failed": False}


class CompiledForward:
    """Stands in as ``block.forward``."""

    def __init__(self, block: nn.Module, compiler: Compiler) -> None:
        self.block, self.compiler = block, compiler
        self._made: Made | None = None
        self._linears: list[QuantLinear] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._may_compile(args, kwargs):
            return self._plain(*args, **kwargs)
        for linear in self._linears:
            linear.renew()
        usual = map(_usual_strides, args)
        named = {name: _usual_strides(value) for name, value in kwargs.items()}
        try:
            return self.compiler.call(self.block, *usual, **named)
        except _compile_errors() as error:
            result = self._plain(*args, **kwargs)  # raises what is wrong with the call itself
            self.compiler.failed = True
            reason = first_line(getattr(error, "inner_exception", error))
            name = self.compiler.block_class.__name__
            say_once(f"{name} runs without the compiler: {reason}", logging.WARNING)
            return result

    def _plain(self, *args: Any, **kwargs: Any) -> Any:
        forward, mode = self.compiler.block_class.forward, self.compiler.attention
        with nullcontext() if mode == "exact" else Redirect(mode):
            return forward(self.block, *args, **kwargs)

    def _may_compile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        able = self.compiler.enabled and not self.compiler.failed
        if not able or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        first = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        return first is not None and has_kernels(first.device) and self._unhooked()

    def _unhooked(self) -> bool:
        """Tell whether nobody counts on the calls of the modules inside, as offloading does."""
        if self._made is None or not self._made.inside():
            self._made = Made.now(self.block)  # adapters put other modules there
            self._linears = [m for m in self._made.modules if isinstance(m, QuantLinear)]
        return self._made.inside()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_made": None, "_linears": []}


def _usual_strides(x: Any) -> Any:
    """Return tokens as most blocks get them: what lies otherwise would be compiled anew. Anything
    but tokens stays.

    A patch embedding leaves channels apart, which only the first block would read. One image may
    have any stride: neighbours in a longer sequence get that of a sequence of their own.
    """
    if not isinstance(x, Tensor) or x.ndim != 3:
        return x
    if x.stride(2) != 1:
        return x.contiguous()
    if len(x) != 1 or x.stride(0) == x.shape[1] * x.stride(1):
        return x
    return x.as_strided(x.shape, (x.shape[1] * x.stride(1), *x.stride()[1:]))


@functools.lru_cache
def has_kernels(device: torch.device) -> bool:
    """Tell whether Triton's kernels run on a device."""
    return why_reference(capability(device)) is None


def _compile_errors() -> tuple[type[Exception], ...]:
    """Return what a compilation raises; not what a block raises itself."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError
