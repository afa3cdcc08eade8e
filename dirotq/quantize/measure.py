"""What plans do to the network, packed in memory by nearest rounding (docs/method.md M6).

How much each site alone disturbs the denoiser's output, and the A/B check: images of calibration
prompts by several plans, before anything is built on one.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dirotq.calibrate.replay import Replay
from dirotq.device import compute_dtype, release
from dirotq.errors import NumericalError
from dirotq.evaluate.fidelity import psnr
from dirotq.kernels.linear import PointwiseView, SiteView
from dirotq.models.call import Call, by_part
from dirotq.models.denoisers import denoisers_of, joined, prefix
from dirotq.packed.swap import swap_sites
from dirotq.pipeline.artifact import Artifact
from dirotq.progress import track
from dirotq.quantize.nearest import pack_nearest
from dirotq.quantize.plan import SitePlan
from dirotq.sources.generation import generate
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import Prompt


def site_errors(
    model: DiffusersModel,
    lines: Sequence[SitePlan],
    basis: Artifact,
    calls: Sequence[Call],
    device: torch.device,
) -> dict[str, float]:
    """Measure the mean squared error of the denoiser's output over ``calls``: {site: error}.

    One site alone is quantized as its line says, by nearest rounding.

    Every call passes through the network once as it is and once per site, all of these block by
    block together (dirotq/calibrate/replay.py): one block's weights are in memory, and a waiting
    copy of each call per site, in as many passes as their memory asks for. A site is packed once
    per pass, and its copies are computed from the site's block on. In bfloat16 (on a GPU) the
    rounding of the network itself is a noise floor under every error.

    Raises NumericalError naming the site whose error is not finite.
    """
    replay = Replay.of(model, device, compute_dtype(device))
    shared = _Shared(replay)
    errors = dict.fromkeys((line.site.name for line in lines), 0.0)
    for denoiser, alike in by_part(calls).items():
        inside = [line for line in lines if line.site.name.startswith(prefix(denoiser))]
        errors |= _errors_of_one(replay, shared, inside, basis, alike) if inside else {}
    return errors


def _errors_of_one(
    replay: Replay,
    shared: "_Shared",
    lines: Sequence[SitePlan],
    basis: Artifact,
    calls: Sequence[Call],
) -> dict[str, float]:
    """Measure sites of one denoiser over calls of it."""
    at_once = max(replay.make_room(calls[0], len(calls) * (len(lines) + 1)), 2)
    sums = dict.fromkeys((line.site.name for line in lines), 0.0)
    parts = [lines[i : i + at_once - 1] for i in range(0, len(lines), at_once - 1)]
    few = max(at_once // (len(lines) + 1), 1)  # calls in one pass
    passes = [(calls[i : i + few], part) for i in range(0, len(calls), few) for part in parts]
    for number, (some, part) in enumerate(passes, 1):
        each = len(part) + 1  # copies of a call, of which the first stays as it is
        copies = [call for call in some for _ in range(each)]
        what = f"rank: sensitivities, pass {number} of {len(passes)}"
        shared.begin(part)
        with _perturbed(replay, part, "", basis):
            for step in track(replay.steps(copies), what, total=len(replay.blocks)):
                shared.step(part, step.block)
                with _perturbed(replay, part, step.block, basis):
                    step.run()
        for i in range(len(some)):
            want, *found = replay.outputs[i * each : (i + 1) * each]
            for line, got in zip(part, found, strict=True):
                sums[line.site.name] += _squared_error(got, want, line.site.name) / len(calls)
    return sums


def plans_psnr(
    model: DiffusersModel,
    plans: Sequence[Sequence[SitePlan]],
    basis: Artifact,
    prompts: Sequence[Prompt],
    *,
    batch: int,
    device: torch.device,
) -> list[Tensor]:
    """PSNR (dB, range 1) of each plan's images to the 16-bit ones, float64 [B] per plan.

    Plans are packed in memory by nearest rounding, one after the other, in a pipeline that is
    loaded anew for each: memory for the whole 16-bit pipeline is needed, as in ``reference``.
    """
    call = model.call_arguments()

    def images(plan: Sequence[SitePlan] | None, what: str) -> Tensor:
        release(device)  # the pipeline of another plan
        pipe = model.pipeline(compute_dtype(device), device)
        if plan is not None:
            lines, weights = {line.site: line for line in plan}, model.weights()
            swap_sites(
                joined(denoisers_of(pipe)),
                lines,
                lambda site: pack_nearest(lines[site], basis, weights, device),
            )
        starts = track(range(0, len(prompts), batch), what)
        return torch.cat([generate(pipe, prompts[i : i + batch], call) for i in starts])

    want = images(None, "A/B check: 16-bit images")
    found = []
    for number, plan in enumerate(plans, 1):
        got = images(plan, f"A/B check: plan {number} of {len(plans)}")
        found.append(psnr(got, want).double())
    return found


@dataclass
class _Shared:
    """What copies of a call have in common up to the block in which they begin to differ.

    ``each``  copies of a call; ``same`` those that equal the first one so far
    """

    replay: Replay
    each: int = 1
    same: set[int] = field(default_factory=set)
    outputs: dict[int, Any] = field(default_factory=dict)
    """Of the block that is run, by the first copy of each call."""

    def __post_init__(self) -> None:
        for block in self.replay.blocks:
            module = self.replay.transformer.get_submodule(block)
            module.forward = partial(self._forward, module.forward)

    def begin(self, part: Sequence[SitePlan]) -> None:
        """Begin a pass, whose copies follow their calls as far as a block's inputs are equal."""
        self.each = len(part) + 1
        blocks = self.replay.blocks
        self.same = {copy for copy, line in enumerate(part, 1) if line.site.block in blocks}

    def step(self, part: Sequence[SitePlan], block: str) -> None:
        """Begin a step of the pass."""
        self.same -= {copy for copy, line in enumerate(part, 1) if line.site.block == block}
        self.outputs = {}

    def _forward(self, compute: Any, *args: Any, **kwargs: Any) -> Any:
        call, copy = divmod(self.replay.current, self.each)
        if copy in self.same and call in self.outputs:
            return tree_map_only(Tensor, Tensor.clone, self.outputs[call])  # each waits alone
        output = compute(*args, **kwargs)
        if copy == 0:
            self.outputs[call] = output
        return output


@contextmanager
def _perturbed(
    replay: Replay, lines: Sequence[SitePlan], block: str, basis: Artifact
) -> Iterator[None]:
    """While open, copy i + 1 of each call has ``lines[i]`` quantized, of the sites in ``block``."""
    with ExitStack() as hooks:
        for copy, line in enumerate(lines, 1):
            if line.site.block != block:
                continue
            packed = pack_nearest(line, basis, replay.weights, replay.device)
            for linear, rows in line.site.slices():
                view: nn.Module = SiteView(packed, rows)
                if line.site.pointwise:
                    view = PointwiseView(view)

                def perturb(
                    _: nn.Module, args: Any, output: Tensor, view: Any = view, copy: int = copy
                ) -> Any:
                    # None leaves the output as it is.
                    here = replay.current % (len(lines) + 1) == copy
                    return view(args[0]) if here else None

                module = replay.transformer.get_submodule(linear)
                hooks.callback(module.register_forward_hook(perturb).remove)
        yield


def _squared_error(got: Tensor, want: Tensor, site: str) -> float:
    error = float((got.double() - want.double()).square().mean())
    if not error < float("inf"):
        raise NumericalError(
            f"site {site}: quantized alone it makes the denoiser's output non-finite on the "
            "captured calls; the model overflows in this precision"
        )
    return error
