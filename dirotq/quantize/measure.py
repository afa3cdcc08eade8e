"""What plans do to the network, packed in memory by nearest rounding (docs/method.md M6).

How much each site alone disturbs the denoiser's output, and the A/B check: images of calibration
prompts by several plans, before anything is built on one.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dirotq.calibrate.adjoint import ROOM, Add, Adjoint
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
from dirotq.quantize.nearest import pack_each, pack_nearest
from dirotq.quantize.plan import SitePlan
from dirotq.sources.generation import generate
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import Prompt

log = logging.getLogger(__name__)

DIRECTIONS = 8
"""Of a call's output, along which errors are estimated."""
Numbered = dict[int, SitePlan]
"""What plans, by their number, do to one site."""


def site_errors(
    model: DiffusersModel,
    plans: Sequence[Sequence[SitePlan]],
    basis: Artifact,
    calls: Sequence[Call],
    device: torch.device,
) -> list[dict[str, float]]:
    """Estimate the mean squared error of the denoiser's output over ``calls``, by each plan:
    {site: error}.

    One site alone is quantized as its line says, by nearest rounding. To first order that moves the
    output o by J e, with the error e of the site's own output, and for v of N(0, 1) the mean of
    (v . J e)^2 is |J e|^2. Gradients of v . o by all sites come together, block by block, for
    DIRECTIONS v of each call (dirotq/calibrate/adjoint.py), and serve all plans: over four calls an
    estimate is within a quarter, as a standard deviation. Measuring every site by itself takes half
    the network for each of them, and where an error is small, bfloat16 rounds it away.

    Raises NumericalError naming the site whose error is not finite.
    """
    replay = Replay.of(model, device, compute_dtype(device))
    adjoint = Adjoint(replay, DIRECTIONS)
    errors = [dict.fromkeys((line.site.name for line in plan), 0.0) for plan in plans]
    cut = set[str]()
    for denoiser, alike in by_part(calls).items():
        inside = defaultdict[str, Numbered](dict)
        for number, plan in enumerate(plans):
            for line in plan:
                if line.site.name.startswith(prefix(denoiser)):
                    inside[line.site.name][number] = line
        watch = partial(_watched, replay, list(inside.values()), basis, cut)
        each = ROOM * len(replay.blocks)  # what each call gives to each block waits
        at_once = max(replay.make_room(alike[0], each * len(alike)) // each, 1)
        adjoint.park, replay.park = replay.park, False
        for first in range(0, len(alike) if inside else 0, at_once):
            some = alike[first : first + at_once]
            moved, sizes = adjoint.disturbed(some, first, watch, "rank: sensitivities")
            for (number, name), products in moved.items():
                squares = products.square().mean(1).tolist()
                error = sum(s / size for s, size in zip(squares, sizes, strict=True))
                if not error < float("inf"):
                    raise NumericalError(
                        f"site {name}: how much it disturbs the denoiser's output is not finite "
                        "on the captured calls; the model, or the gradients of a kernel, overflow "
                        "in this precision. rank.sensitive=null does without, device=cpu computes "
                        "in float32"
                    )
                errors[number][name] += error / len(alike)
    if cut:
        log.warning(
            "%d sites, such as %s, compute without gradients: how much they disturb is not known, "
            "and counts as nothing", len(cut), min(cut),
        )  # fmt: skip
    return errors


@contextmanager
def _watched(
    replay: Replay, sites: Sequence[Numbered], basis: Artifact, cut: set[str], block: str, add: Add
) -> Iterator[None]:
    """While open, tell by how much the linears of a block's sites would be off by each plan, as
    (its number, the site).

    Those that compute without gradients are added to ``cut``.
    """
    with ExitStack() as hooks:
        for lines in sites:
            site = next(iter(lines.values())).site
            if site.block != block:
                continue
            made = pack_each(list(lines.values()), basis, replay.weights, replay.device)
            for linear, rows in site.slices():
                views: list[nn.Module] = [SiteView(packed, rows) for packed in made]
                if site.pointwise:
                    views = [PointwiseView(view) for view in views]
                named = {(n, site.name): view for n, view in zip(lines, views, strict=True)}

                def tell(
                    _: nn.Module, args: Any, y: Tensor, named: Any = named, name: str = site.name
                ) -> Tensor:
                    if block and not torch.is_grad_enabled():
                        cut.add(name)
                    seen = y if y.requires_grad else y.detach().requires_grad_()
                    for key, view in named.items():
                        with torch.no_grad():
                            off = view(args[0]) - y
                        add(key, seen, off)
                    return seen.clone()  # what follows may write to it

                module = replay.transformer.get_submodule(linear)
                hooks.callback(module.register_forward_hook(tell).remove)
        yield


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
    call = model.sample_arguments()

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
