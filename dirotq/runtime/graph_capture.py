"""Record a call into a CUDA graph, replay it, and clean up after a recording that failed."""

import gc
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from threading import RLock
from typing import Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor

from .graph_call import Call, NotGraphable, check_result, copied
from .host_copies import HostCopies

Replay = Callable[[], Any]
"""Does the recorded work again; its result lies in the same tensors each time."""


class Graph:
    """One recorded call: the tensors it reads, and how to do it again."""

    def __init__(
        self,
        original: Callable[..., Any],
        call: Call,
        recorder: "CudaRecorder",
        owned: Iterable[Tensor],
    ) -> None:
        self.recorder = recorder
        # Normal tensors, which can be written to in and outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [
                torch.empty_like(t, memory_format=torch.contiguous_format) for t in call.tensors
            ]
        signature = inspect.signature(original)

        def run() -> Any:
            bound = call.bind(signature, self.inputs)  # its containers anew: forwards pop from them
            result = original(*bound.args, **bound.kwargs)
            check_result(result)
            return result

        with recorder.turn():
            self._fill(call.tensors)
            self.replay: Replay = recorder.capture(run, owned)

    def __call__(self, tensors: list[Tensor]) -> Any:
        with self.recorder.turn():
            self._fill(tensors)
            # Copied before any other graph can run: graphs of one pool may write where this one's
            # result lies, and callers keep several results (guidance).
            return copied(self.replay())

    def _fill(self, tensors: list[Tensor]) -> None:
        for mine, given in zip(self.inputs, tensors, strict=True):
            mine.copy_(given)


class CudaRecorder:
    """CUDA graphs of one network on one device, in one memory pool.

    Tests put in its place one that calls the recorded function again.
    """

    device_type: ClassVar[str] = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One stream for warm-ups and captures: cuBLAS keeps a workspace per stream, which is to
        # exist before a capture, or it would lie in the graph's memory.
        self.side = torch.cuda.Stream(device)
        self.graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self.pool = torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()
        self.lock = RLock()
        self.pools = {self.pool}
        self.broken: list[torch.cuda.CUDAGraph] = []

    @staticmethod
    def busy() -> bool:
        """Tell whether somebody is recording already."""
        return torch.cuda.is_current_stream_capturing()

    def capture(self, run: Callable[[], Any], owned: Iterable[Tensor] = ()) -> Replay:
        """Record ``run``, which reads and writes tensors that stay where they are.

        owned: tensors that it reads and somebody else keeps alive, such as weights.

        Raises whatever ``run`` or the recording raised; the device is usable then.
        """
        copies = HostCopies(self.device_type, owned)
        with torch.cuda.device(self.device):
            with copies.noting():
                self._warm_up(run)
            if not self.graphs:
                # A pool without graphs is given back, and can't be used again before it is.
                self.pool = torch.cuda.graph_pool_handle()
                self.pools = {self.pool}
            graph, reason = torch.cuda.CUDAGraph(), ""
            try:
                # The first context: `torch.cuda.graph` leaves its stream current if it can't end.
                with (
                    _no_garbage_collection(),
                    torch.cuda.stream(self.side),
                    torch.cuda.graph(
                        graph,
                        pool=self.pool,
                        stream=self.side,
                        capture_error_mode="thread_local",  # other threads may go on allocating
                    ),
                ):
                    try:
                        with copies.repeating():
                            result = run()
                    except Exception as error:
                        reason = first_line(error)  # ending the capture raises an error of its own
                        raise
            except BaseException as error:
                self._abandon(graph)
                if reason:
                    raise NotGraphable(reason) from error
                raise

        self.graphs.add(graph)
        return partial(_replay, graph, result, copies.kept())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let one replay go on with its inputs and outputs: replays share memory, so whatever
        thread or stream one comes from, it waits for the one before."""
        with self.lock, torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.done)
            yield
            self.done.record(stream)

    def settle(self) -> None:
        """Wait for replays under way, before what they use is dropped."""
        torch.cuda.synchronize(self.device)

    def reserved(self) -> int:
        """Count the bytes held for recordings."""
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) in self.pools)

    def _warm_up(self, run: Callable[[], Any]) -> None:
        current = torch.cuda.current_stream()
        self.side.wait_stream(current)
        try:
            with torch.cuda.stream(self.side):
                run()
        finally:
            current.wait_stream(self.side)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what a failed capture leaves behind in torch, which doesn't (CUDAGraph::reset)."""
        try:
            graph.pool()
            ended = True
        except RuntimeError:
            ended = False
        graph.reset()
        if not ended:
            # The allocator still believes that a capture is under way, and counts its pool as used.
            for undo in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
                with suppress(RuntimeError):  # it was not told yet, or it knows already
                    undo(torch.cuda.current_device(), self.pool)
            # It may still ask the graph whether an allocation is its own.
            self.broken.append(graph)
        # Its pool is in an unknown state: graphs before keep it, those after get another.
        self.pool = torch.cuda.graph_pool_handle()
        self.pools.add(self.pool)
        with suppress(RuntimeError):
            torch.cuda.synchronize()
            # Older releases let the random generator think it is captured, until a capture ends.
            with torch.cuda.stream(self.side), torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros(1, device=self.device)


def _replay(graph: torch.cuda.CUDAGraph, result: Any, _kept: list[Tensor]) -> Any:
    """Do the work again; ``_kept`` is read by it, and held by nobody else."""
    graph.replay()
    return result


def first_line(error: BaseException) -> str:
    """Return what an error says, without the advice that CUDA's errors go on with."""
    if isinstance(error, NotGraphable):
        return str(error)
    line, notes = str(error).partition("\n")[0], getattr(error, "__notes__", [])
    return " ".join([f"{type(error).__name__}: {line}", *notes[:1]])


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Garbage may be tensors and graphs, and freeing those is not allowed during a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
