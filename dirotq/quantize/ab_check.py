"""Compare plans end to end (A/B) before anything is built on one: images of calibration prompts.

Letters: B prompts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dirotq.device import compute_dtype
from dirotq.evaluate.fidelity import psnr
from dirotq.packed.swap import swap_sites
from dirotq.pipeline.artifact import Artifact
from dirotq.progress import track
from dirotq.quantize.nearest import pack_nearest
from dirotq.quantize.plan import SitePlan
from dirotq.sources.generation import generate
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import Prompt


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
        pipe = model.pipeline(compute_dtype(device), device)
        if plan is not None:
            lines, weights = {line.site: line for line in plan}, model.weights()
            swap_sites(
                pipe.transformer,
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
