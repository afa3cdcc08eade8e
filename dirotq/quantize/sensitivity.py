"""How much each site alone disturbs the denoiser's output (docs/method.md M6)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dirotq.calibrate.replay import Walk
from dirotq.device import compute_dtype, free_host_memory
from dirotq.errors import NumericalError
from dirotq.kernels.linear import PointwiseView, SiteView
from dirotq.models.call import Call
from dirotq.pipeline.artifact import Artifact
from dirotq.progress import track
from dirotq.quantize.memory import HOST_SHARE, STATE_SHARE, calls_at_once
from dirotq.quantize.nearest import pack_nearest
from dirotq.quantize.plan import SitePlan
from dirotq.sources.model import DiffusersModel


def site_errors(
    model: DiffusersModel,
    lines: Sequence[SitePlan],
    basis: Artifact,
    calls: Sequence[Call],
    device: torch.device,
) -> dict[str, float]:
    """Mean squared error of the denoiser's output over ``calls`` when one site alone is quantized
    as its line says, by nearest rounding: {site: error}.

    Every call passes through the network once as it is and once per site, all of these block by
    block together (dirotq/calibrate/replay.py): one block's weights are in memory, and a waiting
    call per site, in as many sweeps as their memory asks for. In bfloat16 (on a GPU) the rounding
    of the network itself is a floor under every error.

    Raises NumericalError naming the site whose error is not finite.
    """
    weights = model.weights()
    blocks = list(dict.fromkeys(s.block for s in model.sites() if s.block))
    walk = Walk(model.skeleton(), weights, blocks, device=device, dtype=compute_dtype(device))
    at_once = _copies_at_once(walk, calls, len(lines) + 1, device)
    sums = dict.fromkeys((line.site.name for line in lines), 0.0)
    sweeps = [lines[i : i + at_once - 1] for i in range(0, len(lines), at_once - 1)]
    steps = iter(track(range(len(calls) * len(sweeps) * len(blocks)), "rank: sensitivities"))
    for call in calls:
        for sweep in sweeps:
            perturbing = _Perturbing(walk, sweep, basis, weights, steps)
            with perturbing.at(""):
                want, *found = walk.run([call] * (len(sweep) + 1), perturbing.at)
            for line, got in zip(sweep, found, strict=True):
                sums[line.site.name] += _squared_error(got, want, line.site.name) / len(calls)
    next(steps, None)
    return sums


class _Perturbing:
    """Replaces one site's outputs in each copy of a call: copy i + 1 has ``lines[i]`` quantized."""

    def __init__(
        self,
        walk: Walk,
        lines: Sequence[SitePlan],
        basis: Artifact,
        weights: Any,
        steps: Iterator[int],
    ) -> None:
        self.walk, self.lines, self.basis = walk, lines, basis
        self.weights, self.steps = weights, steps

    @contextmanager
    def at(self, block: str, part: nn.Module | None = None) -> Iterator[None]:
        """While ``block`` is passed; "" for sites in none."""
        with ExitStack() as stack:
            for copy, line in enumerate(self.lines, 1):
                if line.site.block == block:
                    self._hook(stack, copy, line)
            yield
        next(self.steps, None)

    def _hook(self, stack: ExitStack, copy: int, line: SitePlan) -> None:
        packed = pack_nearest(line, self.basis, self.weights, self.walk.device)
        for consumer, rows in line.site.slices():
            view: nn.Module = SiteView(packed, rows)
            if line.site.pointwise:
                view = PointwiseView(view)

            def perturb(_: nn.Module, args: Any, output: Tensor, view: Any = view) -> Any:
                # None leaves the output as it is.
                return view(args[0]) if self.walk.current == copy else None

            module = self.walk.transformer.get_submodule(consumer)
            stack.callback(module.register_forward_hook(perturb).remove)


def _squared_error(got: Tensor, want: Tensor, site: str) -> float:
    error = float((got.double() - want.double()).square().mean())
    if not error < float("inf"):
        raise NumericalError(
            f"site {site}: quantized alone it makes the denoiser's output non-finite on the "
            "captured calls; the model overflows in this precision"
        )
    return error


def _copies_at_once(walk: Walk, calls: Sequence[Call], count: int, device: torch.device) -> int:
    """How many copies of a call to keep on their way, at least the plain one and another."""
    each = max(walk.state_bytes(calls[0]), 1)
    host = HOST_SHARE * free_host_memory()
    room = host if device.type == "cpu" else STATE_SHARE * torch.cuda.mem_get_info(device)[0]
    at_once, walk.park = calls_at_once(each, count, room, host)
    walk.park &= device.type == "cuda"
    return max(at_once, 2)
