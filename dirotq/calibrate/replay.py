"""Run many calls through a transformer one block at a time, so that one block's weights suffice.

    for step in replay.steps(calls):  # step.block has its weights, all other blocks have none
        step.run()                    # every call passes the block

Every call is a coroutine (a greenlet) inside the transformer's own ``forward``; it stops wherever a
block is about to run. A step loads the block that is awaited, lets every call pass through it, and
drops it again. What a transformer does between its blocks needs no description here.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dirotq.models.call import Call
from dirotq.models.skeleton import assign, drop, move_buffers, names_in, names_outside
from dirotq.pipeline.machine import free_ram
from dirotq.sources.model import DiffusersModel
from dirotq.sources.weights import Weights

from .aside import Aside

SMALL = 1 << 20
"""Tensors of fewer bytes stay on the GPU when a waiting call is parked."""
SLAB = 1 << 30
ALIGNMENT = 256
STATE_SHARE = 0.6
"""Share of the GPU's budget for waiting calls; the rest is a block's and one call's own."""
HOST_SHARE = 0.6
"""Share of free host memory for calls that are parked there."""


class Replay:
    """Passes of calls through ``transformer``, which serves nothing else from now on.

    transformer  its parameters are on the meta device
    weights      where blocks come from
    blocks       paths of the modules to stream; all others are loaded now
    dtype        compute dtype; with float32, 16-bit arguments are widened too

    ``park`` waiting calls' activations are kept in page-locked host memory (:meth:`make_room`).
    ``graphs``: calls keep their autograd graphs (dirotq/calibrate/adjoint.py).
    ``current`` is the index of the call that is running, ``first`` for the first of those given to
    :meth:`steps`; ``outputs`` has what each call of the last pass returned.
    """

    def __init__(
        self,
        transformer: Any,
        weights: Weights,
        blocks: Iterable[str],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.transformer, self.weights, self.blocks = transformer, weights, tuple(blocks)
        self.device, self.dtype, self.park = device, dtype, False
        self.graphs = False
        self.current = 0
        self.outputs: list[Tensor] = []
        self.arena = HostArena()
        self._aside = Aside(device)
        self._queued: torch.cuda.Event | None = None
        weights.fill(transformer, names_outside(transformer, self.blocks), device, dtype)
        move_buffers(transformer, device)
        for block in self.blocks:
            module = transformer.get_submodule(block)
            module.register_forward_pre_hook(partial(_stop, block), with_kwargs=True)

    @classmethod
    def of(cls, model: DiffusersModel, device: torch.device, dtype: torch.dtype) -> "Replay":
        """Return a replay of the model's transformer that streams every block with a site."""
        blocks = dict.fromkeys(site.block for site in model.sites() if site.block)
        return cls(model.skeleton(), model.weights(), blocks, device=device, dtype=dtype)

    def steps(self, calls: Sequence[Call], first: int = 0) -> Iterator["Step"]:
        """Make one pass: yield every block, in order, once its weights are there.

        Those of the next block, if blocks follow each other as listed, are read meanwhile.

        What is inside of a block may be watched or swapped before its step runs; a step that was
        not run by the time the next one is asked for is run then. What the transformer does before
        its first block happens before the first step, and the rest of it within the last one.
        """
        forwards = [_Forward(self, index, call) for index, call in enumerate(calls, first)]
        with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
            for forward in forwards:
                stack.callback(forward.cancel)
            coming = {block: pool.submit(self._read, block) for block in self.blocks[:1]}
            for forward in forwards:
                forward.proceed()
            while block := next((f.block for f in forwards if f.block), None):
                tensors = coming.pop(block).result() if block in coming else self._read(block)
                names, place = self._assign(tensors), self.blocks.index(block) + 1
                del tensors
                coming = {b: pool.submit(self._read, b) for b in self.blocks[place : place + 1]}
                step = Step(block, [f for f in forwards if f.block == block])
                yield step
                step.run()
                drop(self.transformer, names)
                self._keep_pace()
            self.outputs = [forward.output for forward in forwards]

    def loaded(self, blocks: Sequence[str]) -> Iterator[str]:
        """Yield blocks in the order given, the weights of each in memory until the next one is
        asked for; the next one's are read meanwhile."""
        with ThreadPoolExecutor(1) as pool:
            coming = [pool.submit(self._read, block) for block in blocks[:1]]
            for place, block in enumerate(blocks, 1):
                names = self._assign(coming.pop().result())
                coming = [pool.submit(self._read, b) for b in blocks[place : place + 1]]
                yield block
                drop(self.transformer, names)
                self._keep_pace()

    def _keep_pace(self) -> None:
        """Wait for the kernels of the block before the last one.

        Queued kernels hold on to their block's weights, and blocks are read faster than passed.
        """
        if self._queued is not None:
            self._queued.synchronize()
        self._queued = self._aside.mark()

    def _assign(self, tensors: dict[str, Tensor]) -> list[str]:
        """Put a block's weights into it; return their names."""
        self._aside.hand_over(tensors.values())
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            assign(self.transformer.get_submodule(path), leaf, tensor)
        return list(tensors)

    def _read(self, block: str) -> dict[str, Tensor]:
        names = names_in(self.transformer, block)
        with self._aside.after(None):
            return dict(self.weights.read(self.transformer, names, self.device, self.dtype))

    def make_room(self, call: Call, count: int, vram: int | None = None, processes: int = 1) -> int:
        """Return how many of ``count`` calls like ``call`` to keep on their way; set ``park``.

        vram       bytes of GPU memory to stay within; None for what is free
        processes  how many share the host's memory
        """
        each = max(self._state_bytes(call), 1)
        host = int(HOST_SHARE * free_ram() / processes)
        if self.device.type == "cpu":
            return calls_at_once(each, count, host, host)[0]
        limit = torch.cuda.mem_get_info(self.device)[0] if vram is None else vram
        room = int(STATE_SHARE * limit) - torch.cuda.memory_allocated(self.device)
        at_once, self.park = calls_at_once(each, count, room, host)
        return at_once

    def _state_bytes(self, call: Call) -> int:
        """Return what one waiting call holds on to: the tensors that its first block is given."""
        forward = _Forward(self, 0, call)
        forward.proceed()
        size = sum(storage.nbytes() for storage in forward.storages)
        forward.cancel()
        return size


def calls_at_once(each: float, count: int, room: float, host: float) -> tuple[int, bool]:
    """Return how many calls to keep on their way, and whether to park them in host memory.

    each, count  bytes of one waiting call, and how many calls there are
    room, host   bytes of GPU memory and of host memory that they may take
    """
    if each * count <= room:
        return count, False
    return max(1, min(count, int(host // max(each, 1)))), True


@dataclass(frozen=True)
class Step:
    """One block, its weights in memory, and the calls that wait in front of it."""

    block: str
    waiting: "list[_Forward]"

    def run(self) -> None:
        """Let every call pass the block, up to its next one or its end."""
        while self.waiting:
            self.waiting.pop(0).proceed()


class _Forward:
    """One call: where it waits, and how it goes on.

    ``block`` is the one it waits for, "" before its beginning and after its end; ``storages`` are
    those of the tensors that the block is given.
    """

    def __init__(self, replay: Replay, index: int, call: Call) -> None:
        wide = torch.float32 if replay.dtype == torch.float32 else None
        self.replay, self.index, self.block = replay, index, ""
        self.storages: list[torch.UntypedStorage] = []
        self.parked: list[tuple[torch.UntypedStorage, Tensor]] = []
        self.output: Any = None

        def forward() -> Any:
            arrived = call.on(replay.device, wide)
            called = replay.transformer.get_submodule(call.part)
            outputs = tree_leaves(called(*arrived.args, **arrived.kwargs, return_dict=False))
            made = [output for output in outputs if isinstance(output, Tensor)]
            # Of several, such as a video and its sound, or a list of images, all count.
            return made[0] if len(made) == 1 else torch.cat([o.flatten() for o in made])

        self.coroutine = greenlet(forward)

    def proceed(self) -> None:
        """Run up to the next block, or to the end, with ``output`` set."""
        for storage, host in self.parked:
            storage.resize_(host.numel())
            _bytes(storage, self.replay.device).copy_(host, non_blocking=True)
        self.replay.current = self.index
        with torch.set_grad_enabled(self.replay.graphs):
            result = self.coroutine.switch()
        if self.coroutine.dead:
            self.block, self.output, self.storages, self.parked = "", result, [], []
            return
        self.block, self.storages = result
        if self.replay.park:
            self._park()

    def cancel(self) -> None:
        """Unwind a forward that is under way."""
        if self.coroutine:
            with torch.no_grad():
                self.coroutine.throw()  # GreenletExit

    def _park(self) -> None:
        free = {host.numel(): host for _, host in self.parked}
        self.parked = []
        for storage in self.storages:
            size = storage.nbytes()
            if size >= SMALL and storage.device.type == "cuda":
                host = free.pop(size, None)
                if host is None:
                    host = self.replay.arena.take(size)
                host.copy_(_bytes(storage, self.replay.device), non_blocking=True)
                # Frames of the forward still hold the tensors; only their memory goes. The copy and
                # whatever takes the memory next are in order on one stream.
                storage.resize_(0)
                self.parked.append((storage, host))


def _stop(block: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensors = Call(args, kwargs).tensors()
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    getcurrent().parent.switch((block, list(storages.values())))


def _bytes(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


class HostArena:
    """Page-locked memory cut from large slabs.

    torch rounds each page-locked tensor up to a power of two: 24 GB of weights would take 38.
    Memory comes back when the arena and everything taken from it are gone.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> Tensor:
        """Return ``size`` bytes, uint8, uninitialized."""
        if self._used + size > len(self._slab):
            slab = max(SLAB, 1 << (size - 1).bit_length())
            self._slab = torch.empty(slab, dtype=torch.uint8, pin_memory=True)
            self._used = 0
        start = self._used
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return self._slab[start : start + size]

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy of ``tensor`` here."""
        tensor = tensor.contiguous()
        copy = self.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)
