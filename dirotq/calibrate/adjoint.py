"""Gradients of a denoiser's output by what its sites compute, with one block's weights in memory.

Calls pass the network once, and what each block is given is kept. Then the blocks run again, from
the last one to the first, each with its graph, and gradients go back through it. So the gradients
by all sites together take a few forwards, however many sites there are.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from dirotq.errors import UnsupportedError
from dirotq.models.call import Call
from dirotq.progress import track
from dirotq.sources.hub import first_line

from .replay import Replay

Add = Callable[[Hashable, Tensor, Tensor], None]
"""Takes a name, what a linear returned, and by how much it would be off.

A linear that may be off in several ways is given under several names; all linears of one name are
off together."""
Watch = Callable[[str, Add], contextlib.AbstractContextManager[None]]
"""Opens a context in which the linears of a block's sites ("": of those outside of blocks) are
reported."""
Reported = tuple[Hashable, Tensor, Tensor]
"""The same, kept."""
Gradients = list[Tensor | None]
"""Of one tensor, for each direction of the output."""
ROOM = 2
"""Times what blocks are given: half of the room for waiting calls is for a block's graph."""
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN, whose gradients are NaN for some lengths on Hopper (pytorch issue 196678)."""
REFUSAL = "_validate_device"
"""What refuses gradients of flex attention on a CPU. Those of plain torch, they exist there too."""


@dataclass(eq=False)
class _Passed:
    """One block that one call has passed.

    got    all that it got
    given  what of that leads to earlier blocks, by place: where gradients go on
    made   what it returned, as the beginnings of another graph; they hold no numbers
    """

    block: str
    call: int
    got: list[Any]
    tree: Any
    given: dict[int, GradientEdge]
    made: list[Tensor]


class Adjoint:
    """A replay whose blocks keep what they are given; it serves nothing else from now on.

    ``park``  what they are given is kept in host memory
    """

    def __init__(self, replay: Replay, directions: int) -> None:
        self._replay, self._directions, self.park = replay, directions, False
        self._computes: dict[str, Any] = {}
        self._passed: list[_Passed] = []
        replay.graphs = True
        for block in replay.blocks:
            module = replay.transformer.get_submodule(block)
            self._computes[block] = module.forward
            module.forward = partial(self._forward, block)

    def disturbed(
        self, calls: Sequence[Call], first: int, watch: Watch, what: str
    ) -> tuple[dict[Any, Tensor], list[int]]:
        """Return {name: float64 [calls, directions]}, how far along each direction the output moves
        when what was reported by a name is off, to first order; and the numbers in the output of
        each call.

        first  number of the first call: directions are drawn from N(0, 1) by call and number

        Raises UnsupportedError where the network has no gradients on this device.
        """
        with _differentiable(self._replay.transformer):
            return self._disturbed(calls, first, watch, what)

    def _disturbed(
        self, calls: Sequence[Call], first: int, watch: Watch, what: str
    ) -> tuple[dict[Any, Tensor], list[int]]:
        replay, self._passed = self._replay, []
        outside: list[list[Reported]] = [[] for _ in calls]
        inside: list[Reported] = []
        moved: dict[Any, Tensor] = {}

        def add(call: int, name: Hashable, off: Tensor, direction: int, gradient: Tensor) -> None:
            if name not in moved:
                shape = len(calls), self._directions
                moved[name] = torch.zeros(shape, dtype=torch.float64, device=off.device)
            moved[name][call, direction] += torch.linalg.vecdot(gradient, off).double().sum()

        with watch("", lambda *site: outside[replay.current - first].append(site)):
            for step in track(replay.steps(calls, first), what, total=len(replay.blocks)):
                step.run()
        sources = [{y for _, y, _ in sites} for sites in outside]
        for passed in self._passed:
            sources[passed.call - first] |= set(passed.made)
        found: dict[Tensor, Gradients] = defaultdict(self._none)
        sizes = [output.numel() for output in replay.outputs]
        for call, output in enumerate(replay.outputs):
            self._pull([output], [self._drawn(output, first + call)], sources[call], found)
        replay.outputs = []
        runs = [(block, list(run)) for block, run in groupby(reversed(self._passed), _block)]
        self._passed = []
        for block in track(replay.loaded([block for block, _ in runs]), what, total=len(runs)):
            with watch(block, lambda *site: inside.append(site)):
                for passed in runs.pop(0)[1]:
                    call = passed.call - first
                    sources[call].difference_update(passed.made)
                    self._back(passed, inside, sources[call], found, partial(add, call))
        for call, sites in enumerate(outside):
            for name, y, off in sites:
                for direction, gradient in enumerate(found.get(y, ())):
                    if gradient is not None:
                        add(call, name, off, direction, gradient)
        return moved, sizes

    def _forward(self, block: str, *args: Any, **kwargs: Any) -> Any:
        """Let a call pass a block, and begin a new graph behind it."""
        got, tree = tree_flatten((args, kwargs))
        given = {i: get_gradient_edge(t) for i, t in enumerate(got) if _graphed(t)}
        # A copy: block and network may write to what the block is given.
        kept = [self._kept(t) if i in given else t for i, t in enumerate(got)]
        with torch.no_grad():
            output, back = tree_flatten(self._computes[block](*args, **kwargs))
        begun = {i: _begin(t) for i, t in enumerate(output) if _real(t)}
        made = [source for source, _ in begun.values()]
        self._passed.append(_Passed(block, self._replay.current, kept, tree, given, made))
        output = [begun[i][1] if i in begun else each for i, each in enumerate(output)]
        return tree_unflatten(output, back)

    def _kept(self, tensor: Tensor) -> Tensor:
        where = torch.device("cpu") if self.park else tensor.device
        return tensor.detach().to(where, copy=True)

    def _back(
        self,
        passed: _Passed,
        inside: list[Reported],
        sources: set[Tensor],
        found: dict[Tensor, Gradients],
        add: Callable[[Hashable, Tensor, int, Tensor], None],
    ) -> None:
        """Run a block again; ``add`` what its sites do, which come to be ``inside``, and to
        ``found`` the gradients of ``sources``."""
        wanted = [found.pop(y, self._none()) for y in passed.made]
        device = self._replay.device
        inputs = {i: passed.got[i].to(device).requires_grad_() for i in passed.given}
        got = [inputs[i].clone() if i in inputs else each for i, each in enumerate(passed.got)]
        args, kwargs = tree_unflatten(got, passed.tree)
        here: dict[Tensor, Gradients] = defaultdict(self._none)
        with torch.enable_grad():
            leaves = tree_leaves(self._computes[passed.block](*args, **kwargs))
        outputs = [each for each in leaves if _real(each)]
        into = {*inputs.values(), *(y for _, y, _ in inside)}
        # Each is used at once: all directions' would take several times what the linears return.
        for direction, made in self._pulled(outputs, wanted, into):
            for name, y, off in inside:
                if y in made:
                    add(name, off, direction, made[y])
            for given in inputs.values():
                here[given][direction] = made.get(given)
            del made
        inside.clear()  # for the next call
        edges = list(passed.given.values())
        self._pull(edges, [here[t] for t in inputs.values()], sources, found)

    def _pull(
        self,
        outputs: Sequence[Tensor | GradientEdge],
        gradients: Sequence[Gradients],
        sources: set[Tensor],
        found: dict[Tensor, Gradients],
    ) -> None:
        """Add to ``found`` what gradients of the outputs are by the sources."""
        for direction, made in self._pulled(outputs, gradients, sources):
            for source, gradient in made.items():
                before = found[source][direction]
                found[source][direction] = gradient if before is None else before + gradient

    def _pulled(
        self,
        outputs: Sequence[Tensor | GradientEdge],
        gradients: Sequence[Gradients],
        sources: set[Tensor],
    ) -> Iterator[tuple[int, dict[Tensor, Tensor]]]:
        """Yield each direction, and what its gradients are by the sources that have any."""
        into = list(sources)
        for direction in range(self._directions):
            pairs: list[tuple[Any, Tensor | None]] = [
                (output, each[direction])
                for output, each in zip(outputs, gradients, strict=True)
                if (isinstance(output, GradientEdge) or output.requires_grad)
                and each[direction] is not None
            ]
            if not pairs or not into:
                continue
            of, given = zip(*pairs, strict=True)
            made = torch.autograd.grad(of, into, given, retain_graph=True, allow_unused=True)
            yield direction, {s: g for s, g in zip(into, made, strict=True) if g is not None}
            del made  # before the next direction's

    def _drawn(self, output: Tensor, call: int) -> Gradients:
        generator = torch.Generator().manual_seed(call)
        shape = (self._directions, *output.shape)
        return list(torch.randn(shape, generator=generator).to(output.device, output.dtype))

    def _none(self) -> Gradients:
        return [None] * self._directions


@contextlib.contextmanager
def _differentiable(network: nn.Module) -> Iterator[None]:
    """Let attention have gradients while open, in its graph and on the way back through it.

    Raises UnsupportedError where something else has none on this device.
    """
    refusal = vars(flex_attention).get(REFUSAL)
    try:
        with sdpa_kernel(ATTENTION):
            if refusal is not None:
                setattr(flex_attention, REFUSAL, lambda *_: None)
            yield
    except NotImplementedError as error:
        raise UnsupportedError(
            f"{type(network).__name__} has no gradients on this device ({first_line(error)}): set "
            "rank.sensitive=null, or use another device"
        ) from error
    finally:
        if refusal is not None:
            setattr(flex_attention, REFUSAL, refusal)


def _block(passed: _Passed) -> str:
    return passed.block


def _graphed(each: Any) -> bool:
    return isinstance(each, Tensor) and each.requires_grad


def _real(each: Any) -> bool:
    return isinstance(each, Tensor) and each.is_floating_point()


def _begin(made: Tensor) -> tuple[Tensor, Tensor]:
    """Return a source, by which gradients are computed, and what a block returned as a graph that
    begins with it. The source holds no numbers."""
    source = made.detach().requires_grad_()
    begun = _Same.apply(source)
    source.data = torch.empty((), dtype=made.dtype, device=made.device).expand(made.shape)
    return source, begun


class _Same(torch.autograd.Function):
    """A tensor without a copy of it, that may be written to; the beginning of a graph may not."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]
