"""CUDA graphs around a whole denoiser: one launch per step instead of thousands.

:func:`graph_forward` puts a :class:`GraphedForward` in the place of a transformer's ``forward``. A
call that was made once before with the same shapes is recorded, and replayed from then on. A call
that can't be recorded (offloading hooks, gradients, autocast) runs as it always did.
"""

import copy
import functools
import inspect
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import chain
from threading import RLock
from types import MethodType
from typing import Any

import torch
from torch import nn

from dirotq.errors import ConfigError
from dirotq.kernels.chip import say_once

from .graph_call import Call, NotGraphable
from .graph_capture import CudaRecorder, Graph, first_line
from .graph_watch import Watch, runtime_modes

log = logging.getLogger(__name__)

GIVE_UP = 3
"""Failed recordings after which a transformer is left alone."""


def graph_forward(
    transformer: nn.Module, *, limit: int = 4, recorder: type[CudaRecorder] = CudaRecorder
) -> None:
    """Let a transformer's forward be recorded into CUDA graphs and replayed, in place.

    limit  graphs that live at once. Each costs its inputs and outputs; intermediate results lie in
           memory that the transformer's graphs share and keep, as large as the largest one needs.

    A repeated installation starts anew. Arguments, results, signature and state dict are those of
    the original; a deep copy records graphs of its own. ``torch.compile`` sees the original.

    Raises ConfigError if limit is below 1.
    """
    if limit < 1:
        raise ConfigError(
            f"limit is {limit}, but at least one graph has to live: give 1 or more, or don't graph "
            "this transformer"
        )
    ungraph_forward(transformer)
    original = transformer.forward
    graphed = GraphedForward(transformer, original, limit, recorder)
    graphed.watch = Watch(transformer)  # before anyone replaces a block's forward
    transformer.forward = graphed


def ungraph_forward(transformer: nn.Module) -> None:
    """Put the original forward back and drop its graphs; changes nothing where none are."""
    state: dict[str, Any] = vars(transformer)
    for name in ("forward", "_old_forward"):  # accelerate keeps what it wraps under the latter
        graphed = state.get(name)
        if isinstance(graphed, GraphedForward):
            graphed.clear()
            state[name] = graphed.original
            if name == "forward" and graphed.original == MethodType(
                type(transformer).forward, transformer
            ):
                del state[name]


class GraphedForward:
    """Stands in as ``transformer.forward``: records, replays, or calls the original.

    ``calls`` holds the latest ``limit`` kinds of calls, oldest first: None for one that was seen
    once, then its graph. Kinds that come back only after ``limit`` others are thus never recorded,
    which would cost more than it saves, and tensors that the network caches by shape (rotary
    embeddings) outlive the graphs that read them.
    """

    def __init__(
        self,
        transformer: nn.Module,
        original: Callable[..., Any],
        limit: int,
        recorder: type[CudaRecorder],
    ) -> None:
        functools.update_wrapper(self, original)  # pipelines inspect the signature
        self.transformer = transformer
        self.original = original
        self.limit = limit
        self.recorder_type = recorder
        self.signature = inspect.signature(original)
        self.calls: OrderedDict[Hashable, Graph | None] = OrderedDict()
        self.failed: set[Hashable] = set()
        self.recorded = False  # once, and said so
        self.recorder: CudaRecorder | None = None
        # A deep copy's is made by its first call: it is still being filled when this is copied.
        self.watch: Watch | None = None
        self.token: Any = None
        self.lock = RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.original(*args, **kwargs)
        try:
            call, key = self._graphable(args, kwargs)
        except NotGraphable as reason:
            self._say(str(reason), logging.INFO)
            return self.original(*args, **kwargs)
        except TypeError:  # the original says best what is wrong with the arguments
            return self.original(*args, **kwargs)
        with self.lock:
            graph = self._graph(call, key)
        if graph is not None:
            return graph(call.tensors)
        result = self.original(*args, **kwargs)
        with self.lock:
            self._saw(key)
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphedForward":
        transformer = copy.deepcopy(self.transformer, memo)
        original = copy.deepcopy(self.original, memo)
        return GraphedForward(transformer, original, self.limit, self.recorder_type)

    def __getstate__(self) -> tuple[Any, ...]:
        # Graphs, locks and streams are this process's. The class's own forward is not looked up by
        # name when this is read back: there this object would stand.
        own = self.original == MethodType(type(self.transformer).forward, self.transformer)
        original = None if own else self.original
        return self.transformer, original, self.limit, self.recorder_type

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        transformer, original, limit, recorder = state
        own = MethodType(type(transformer).forward, transformer)
        GraphedForward.__init__(self, transformer, original or own, limit, recorder)

    def clear(self) -> None:
        """Drop all graphs; those of later calls are recorded anew.

        Their memory is free then: torch gives it to others once it runs short, or by
        ``torch.cuda.empty_cache()``.
        """
        with self.lock:
            if self.recorder is not None and any(self.calls.values()):
                self.recorder.settle()
            self.calls.clear()
            self.failed.clear()

    def memory(self) -> int:
        """Count the bytes that intermediate results and outputs hold, also between calls."""
        return 0 if self.recorder is None else self.recorder.reserved()

    def _graphable(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Hashable]:
        """Take a call apart; NotGraphable if it or the transformer is not to be recorded."""
        device_type = self.recorder_type.device_type
        if torch.is_grad_enabled():
            raise NotGraphable("gradients are enabled")
        if torch.is_autocast_enabled(device_type):
            raise NotGraphable("autocast is on")
        if torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
            raise NotGraphable("its operators are being traced")
        call = Call.of(self.signature, args, kwargs)
        devices = {tensor.device for tensor in call.tensors}
        if len(devices) != 1 or next(iter(devices)).type != device_type:
            found = ", ".join(sorted(map(str, devices))) or "none"
            raise NotGraphable(f"its tensors are not all on one {device_type} device ({found})")
        if self.recorder_type.busy():
            raise NotGraphable("it is being recorded already")
        with self.lock:
            obstacle = self._look()
        if obstacle is not None:
            raise NotGraphable(obstacle)
        return call, (call.form, self.transformer.training, runtime_modes())

    def _look(self) -> str | None:
        """Drop graphs that the transformer has changed under; why it can't be recorded, or None."""
        if self.watch is None:
            self.watch = Watch(self.transformer)
        obstacle = self.watch.obstacle()
        token = self.watch.token() if obstacle is None else None
        if obstacle is not None or token != self.token:
            self.clear()  # also if there is an obstacle: offloading is there to save memory
            self.watch = Watch(self.transformer, self.watch)
            self.token = None if obstacle is not None else self.watch.token()
        return obstacle

    def _graph(self, call: Call, key: Hashable) -> Graph | None:
        """Return the graph of this kind of call, recorded now if it comes the second time."""
        if key not in self.calls:
            return None
        self.calls.move_to_end(key)
        if self.calls[key] is None and len(self.failed) < GIVE_UP:
            device = call.tensors[0].device
            if self.recorder is None or self.recorder.device != device:
                self.recorder = self.recorder_type(device)
            try:
                self.calls[key] = self._record(call, self.recorder)
            except Exception as error:  # noqa: BLE001 - whatever it is, the original shall meet it
                del self.calls[key]
                self.failed.add(key)
                self._say(f"recording it failed ({first_line(error)})", logging.WARNING)
        return self.calls.get(key)

    def _record(self, call: Call, recorder: CudaRecorder) -> Graph:
        weights = chain(self.transformer.parameters(), self.transformer.buffers())
        began = time.monotonic()
        graph = Graph(self.original, call, recorder, weights)
        shape = " x ".join(map(str, call.tensors[0].shape))
        log.log(
            logging.DEBUG if self.recorded else logging.INFO,
            "%s was recorded as one CUDA graph in %.1f s (%s)",
            type(self.transformer).__name__,
            time.monotonic() - began,
            shape,
        )
        self.recorded = True
        return graph

    def _saw(self, key: Hashable) -> None:
        """Note a kind of call, in the place of the one that was not made for longest."""
        if key in self.failed:
            return
        self.calls.setdefault(key, None)
        self.calls.move_to_end(key)
        while len(self.calls) > self.limit:
            if next(iter(self.calls.values())) is not None and self.recorder is not None:
                self.recorder.settle()
            self.calls.popitem(last=False)

    def _say(self, reason: str, level: int) -> None:
        say_once(f"{type(self.transformer).__name__} runs without a CUDA graph: {reason}", level)
