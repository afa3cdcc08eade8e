"""Run many calls through a transformer one block at a time, so that one block's weights suffice.

Every call is a coroutine (a greenlet) inside the transformer's own ``forward``; it stops wherever a
block is about to run. The walk loads the block that is awaited, lets every call pass through it,
and drops it again. What a transformer does between its blocks needs no description here.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from dirotq.models.call import Call
from dirotq.models.skeleton import drop, move_buffers, names_in, names_outside
from dirotq.sources.weights import Weights

from .host import HostArena

Visit = Callable[[str, nn.Module], AbstractContextManager[Any]]
SMALL = 1 << 20
"""Tensors of fewer bytes stay on the GPU when a waiting call is parked."""


class Walk:
    """Calls on their way through ``transformer``, whose parameters are on the meta device.

    weights  where blocks come from
    blocks   paths of the modules to stream; all others are loaded now
    dtype    compute dtype; with float32, 16-bit arguments are widened too
    park     keep waiting calls' activations in page-locked host memory

    ``current`` is the index of the call that is running, in the sequence given to :meth:`run`.
    """

    def __init__(
        self,
        transformer: Any,
        weights: Weights,
        blocks: Iterable[str],
        *,
        device: torch.device,
        dtype: torch.dtype,
        park: bool = False,
    ) -> None:
        self.transformer, self.weights, self.blocks = transformer, weights, tuple(blocks)
        self.device, self.dtype, self.park = device, dtype, park
        self.current = 0
        self.arena = HostArena()
        weights.fill(transformer, names_outside(transformer, self.blocks), device, dtype)
        move_buffers(transformer, device)

    def run(self, calls: Sequence[Call], visit: Visit | None = None) -> list[Tensor]:
        """The output of every call.

        visit  called with each block's path and module once its weights are there; the context it
               returns is open while the calls pass. It may swap what is inside of the block.
        """
        visit = visit or (lambda *_: nullcontext())
        calls_waiting: dict[int, _Waiting] = {}
        outputs: dict[int, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for block in self.blocks:
                hook = self.transformer.get_submodule(block).register_forward_pre_hook(
                    lambda _, args, kwargs, block=block: _stop(block, args, kwargs),
                    with_kwargs=True,
                )
                stack.callback(hook.remove)
            stack.callback(_cancel, calls_waiting)

            def advance(index: int, waiting: _Waiting) -> None:
                self.current = index
                if waiting.proceed():
                    calls_waiting[index] = waiting
                else:
                    calls_waiting.pop(index, None)
                    outputs[index] = waiting.output

            for index, call in enumerate(calls):
                advance(index, _Waiting(self, call))
            while calls_waiting:
                block = next(iter(calls_waiting.values())).block
                module = self.transformer.get_submodule(block)
                names = names_in(self.transformer, block)
                self.weights.fill(self.transformer, names, self.device, self.dtype)
                with visit(block, module):
                    for index, waiting in list(calls_waiting.items()):
                        if waiting.block == block:
                            advance(index, waiting)
                drop(self.transformer, names)
        return [outputs[index] for index in range(len(calls))]

    def state_bytes(self, call: Call) -> int:
        """What one waiting call holds on to: the tensors that its first block is given."""
        sizes = []
        with torch.no_grad():
            hooks = [
                self.transformer.get_submodule(b).register_forward_pre_hook(
                    lambda _, args, kwargs: _stop("", args, kwargs), with_kwargs=True
                )
                for b in self.blocks
            ]
            waiting = _Waiting(self, call)
            if waiting.proceed():
                sizes = [s.nbytes() for s in waiting.storages]
                waiting.cancel()
            for hook in hooks:
                hook.remove()
        return sum(sizes)


class _Waiting:
    """One call: where it waits, and how it goes on."""

    def __init__(self, walk: Walk, call: Call) -> None:
        wide = torch.float32 if walk.dtype == torch.float32 else None
        self.walk, self.block, self.storages = walk, "", []  # type: ignore[var-annotated]
        self.parked: list[tuple[torch.UntypedStorage, Tensor]] = []
        self.output: Any = None

        def forward() -> Any:
            arrived = call.on(walk.device, wide)
            output = walk.transformer(*arrived.args, **arrived.kwargs, return_dict=False)[0]
            return torch.cat([o.flatten() for o in output]) if isinstance(output, list) else output

        self.coroutine = greenlet(forward)

    def proceed(self) -> bool:
        """Run up to the next block; False at the end, with ``output`` set."""
        for storage, host in self.parked:
            storage.resize_(host.numel())
            _bytes(storage, self.walk.device).copy_(host, non_blocking=True)
        result = self.coroutine.switch()
        if self.coroutine.dead:
            self.output, self.storages, self.parked = result, [], []
            return False
        self.block, self.storages = result
        if self.walk.park:
            self._park()
        return True

    def cancel(self) -> None:
        self.coroutine.throw()  # GreenletExit: the forward unwinds

    def _park(self) -> None:
        free = {host.numel(): host for _, host in self.parked}
        self.parked = []
        for storage in self.storages:
            size = storage.nbytes()
            if size >= SMALL and storage.device.type == "cuda":
                host = free.pop(size, None)
                if host is None:
                    host = self.walk.arena.take(size)
                host.copy_(_bytes(storage, self.walk.device), non_blocking=True)
                # Frames of the forward still hold the tensors; only their memory goes. The copy and
                # whatever takes the memory next are in order on one stream.
                storage.resize_(0)
                self.parked.append((storage, host))


def _cancel(waiting: "dict[int, _Waiting]") -> None:
    for call in waiting.values():
        call.cancel()


def _stop(block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensors = Call(args, kwargs).tensors()
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    getcurrent().parent.switch((block, list(storages.values())))


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
