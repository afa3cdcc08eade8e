"""4-bit codes and scales of every weight, in its site's rotated coordinates."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dirotq.device import pick_device
from dirotq.errors import ConfigError, NumericalError
from dirotq.kernels.gptq import FactorizationError, gptq, hessian_error
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.divided import Make, in_units
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.units import Made, Units
from dirotq.quantize import memory
from dirotq.quantize.moments import Captured, moment
from dirotq.quantize.nearest import nearest
from dirotq.quantize.plan import SitePlan, read_plan
from dirotq.quantize.rotation import Rotation, read_basis
from dirotq.quantize.tensors import ahead, load_site, save_site, site_file
from dirotq.sources.model import DiffusersModel

ROUNDING = (2.0**-22, 2.0**-18, 2.0**-14)
"""Shares of a site's energy below which its second moment is taken to say nothing: float32's share,
then, where that fails, what matrix units may lose while they add up."""


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights:
    """Rotate each site's stacked weights on the fly and round them (docs/method.md M2, M5).

    Scales per channel are large enough for the runtime's FP8 columns (docs/method.md Eq. 9); the
    metric ``rows_on_scale_floor`` is the share of rows whose scale that decided.

    ``damping``  share of the mean diagonal that is added to the second moment before factoring it

    Writes ``sites/<site>.safetensors`` with ``qweight`` (uint8 [N, K/2], layout L1 or L2),
    ``wscale`` (bfloat16 or uint8 [N, G]) and NVFP4's ``wglobal`` (float32 [1]), as the packed model
    holds them, one site at a time; an interrupted run goes on at the next site.

    Raises NumericalError naming the site if its weights are not finite or its second moment can't
    be factored within the damping schedule.
    """

    version: ClassVar[str] = "4"
    resumable: ClassVar[bool] = True
    what: ClassVar[str] = "gptq"
    needs = memory.gptq

    model: DiffusersModel
    damping: float
    device: str = untracked()
    inputs: str = field(init=False, default="exact")
    feedback: bool = field(init=False, default=False)
    """Two options that gained nothing and are gone (docs/quality.md): constants of the recipe."""

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ConfigError(f"gptq.damping={self.damping} is out of range: use 0 < damping <= 1")

    def run(
        self, out: Path, *, capture: Artifact, basis: Artifact, rank: Artifact
    ) -> Mapping[str, float]:
        return in_units(self, out, {"capture": capture, "basis": basis, "rank": rank})

    def units(self, *, rank: Artifact, **_: Artifact) -> list[str]:
        return [entry.site.name for entry in read_plan(rank.file("plan.json"))]

    def maker(
        self, out: Path, _: Sequence[str], *, capture: Artifact, basis: Artifact, rank: Artifact
    ) -> Make:
        device = pick_device(self.device)
        captured, weights = Captured(capture), self.model.weights()
        entries = {entry.site.name: entry for entry in read_plan(rank.file("plan.json"))}

        def read(entry: SitePlan) -> tuple[Any, ...]:
            site = entry.site
            stored, directions = captured.moment_on(site, device), read_basis(entry, basis, device)
            return stored, directions, *weights.stacked(site, device)

        def make(names: Iterable[str]) -> Iterator[Made]:
            planned = (entries[name] for name in names)
            for entry, (stored, directions, weight, bias) in ahead(read, planned, device):
                rotation = Rotation.cut(directions, entry.spec)
                w_z, protected = rotation.weights(weight)
                del weight
                s_DD = moment(stored, device)
                s_z, energy = rotation.moments(s_DD), s_DD.diagonal().double().sum()
                del s_DD
                tensors = quantize_site(w_z, s_z, energy, entry, self.damping, protected, bias)
                yield entry.site.name, [save_site(out / "sites", entry.site.name, tensors)]

        return make

    def merge(self, units: Units, *, rank: Artifact, **_: Artifact) -> Mapping[str, float]:
        return _summary(units.out, read_plan(rank.file("plan.json")))


def quantize_site(
    w_NK: Tensor,
    s_KK: Tensor,
    energy: Tensor,
    entry: SitePlan,
    damping: float,
    wp_NR: Tensor | None,
    bias_N: Tensor | None,
) -> dict[str, Tensor]:
    """Return codes and scales of one site, with what its manifest line needs.

    Where P holds nearly all energy, what is left of S is partly the rounding of its float32
    entries, and may not even be positive: that rounding is added to its diagonal, in place. It is
    taken for larger only where a factorization fails: counted.

    w_NK     float32, [N, K], rotated weights of all linears
    s_KK     float64, [K, K], second moment of the main branch;  energy  the trace of S
    wp_NR    float32, [N, R], the protected columns, or None at rank 0
    bias_N   float32, [N], or None
    returns  ``qweight``, ``wscale``, ``wglobal`` where there is one, ``loss`` (float64 [2]: E|zΔ|²
             over E|zW|² by our codes and by nearest rounding) and ``counts`` (int64 [4]:
             escalations, rows that kept nearest rounding, rows whose scale is the least that the
             appended columns allow, rows)

    Raises NumericalError naming the site if no factorization succeeds.
    """
    spec, before, failures = entry.spec, 0.0, 0
    for share in ROUNDING:
        s_KK.diagonal().add_((share - before) * energy)
        before = share
        rounded = nearest(
            w_NK, spec, clip=entry.clip, wp_NR=wp_NR, bias_N=bias_N, importance_K=s_KK.diagonal()
        )
        codes, counts = rounded.codes, {"escalations": 0, "nearest": len(w_NK)}
        if entry.rounding == "nearest":
            break
        try:
            codes, counts = gptq(
                w_NK, s_KK, rounded.step, damping=damping, element=spec.weights.element
            )
            break
        except FactorizationError as error:
            failure, failures = error, failures + 1
    else:
        raise NumericalError(
            f"site {entry.site.name}: {failure}. Capture more tokens "
            f"(capture.calls) or raise gptq.damping (now {damping})"
        ) from failure
    floor = rounded.floor
    on_floor = 0 if floor is None else int(((rounded.wscale == floor) & (floor > 0)).sum())
    chosen, s_w = rounded._replace(codes=codes), s_KK.to(w_NK.dtype)
    signal = hessian_error(w_NK, s_w).sum().clamp_min(1e-30)
    loss = [
        hessian_error(one.values(w_NK.dtype) - w_NK, s_w).sum() / signal
        for one in (chosen, rounded)
    ]
    escalations = counts["escalations"] + failures
    return chosen.stored(spec) | {
        "loss": torch.stack(loss).double(),
        "counts": torch.tensor([escalations, counts["nearest"], on_floor, len(w_NK)]),
    }


def _summary(out: Path, plan: list[SitePlan]) -> dict[str, float]:
    results = [load_site(out / "sites" / site_file(entry.site.name)) for entry in plan]
    counts = torch.stack([r["counts"] for r in results]).sum(0)
    loss = torch.stack([r["loss"] for r in results])
    return {
        "sites": len(plan),
        "relative_error": float(loss[:, 0].mean()),
        "relative_error_nearest": float(loss[:, 1].mean()),
        "damping_escalations": int(counts[0]),
        "rows_kept_nearest": int(counts[1]) / int(counts[3]),
        "rows_on_scale_floor": int(counts[2]) / int(counts[3]),
    }
