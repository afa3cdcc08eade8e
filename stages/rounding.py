"""Packed sites from the weights alone: no calibration prompts, no statistics of inputs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dirotq.device import pick_device
from dirotq.errors import ConfigError, NumericalError
from dirotq.models.coverage import refuse_few
from dirotq.models.family import Site
from dirotq.pipeline.divided import Make, in_units
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.units import Made, Units
from dirotq.quantize import memory
from dirotq.quantize.nearest import nearest
from dirotq.quantize.plan import Method, SitePlan
from dirotq.quantize.planning import Planned, check_plan, make_plan
from dirotq.quantize.rotation import Rotation
from dirotq.quantize.tensors import ahead, load_site, save_site, site_file
from dirotq.quantize.uncalibrated import advice, guessed_codes
from dirotq.sources.callable import refuse_uncallable
from dirotq.sources.model import DiffusersModel


@dataclass(frozen=True, kw_only=True)
class RoundWeights:
    """Plan every site, transform its weights and round them (docs/method.md M5).

    Stands in the place of ``capture`` to ``fuse`` where a method needs no statistics of inputs: no
    directions protected, Hadamard blocks or no transform. Scales are those of the least squared
    error of the weights; all columns count alike. ``method.rounding=gptq`` takes the second moment
    that the weights suggest (dirotq/quantize/uncalibrated.py).

    ``least_packed``  share of the blocks' parameters that sites must hold: a model of which less
                      could be packed is refused

    ``rehearse``      call the pipeline once without weights, to see that its parts fit each other:
                      no stage of this pipeline runs the model

    Writes ``plan.json`` and ``kept.json`` as ``rank`` does, and ``sites/<site>.safetensors`` with
    all that a packed linear holds, and ``loss`` (float64 [1]: |ΔW|² over |W|²). One site's weights
    are in memory at a time; an interrupted run goes on at the next site.

    Raises ConfigError for a method that needs statistics, NumericalError naming a linear whose
    weights are not finite.
    """

    version: ClassVar[str] = "1"
    resumable: ClassVar[bool] = True
    what: ClassVar[str] = "round"
    needs = memory.rounding

    model: DiffusersModel
    method: Method
    least_packed: float = untracked()
    rehearse: bool = untracked()
    device: str = untracked()

    def __post_init__(self) -> None:
        method = self.method
        needed = {
            f"transform={method.transform.kind}": method.transform.kind == "dense",
            "transform.smooth=true": method.transform.smooth,
            f"method.branch={method.branch and method.branch.kind}": method.branch is not None,
            f"method.sensitive={method.sensitive}": method.sensitive is not None,
        }
        if said := [setting for setting, needs in needed.items() if needs]:
            raise ConfigError(
                f"method={method.name} with pipeline=instant: {', '.join(said)} "
                f"{'needs' if len(said) == 1 else 'need'} statistics of the inputs, which this "
                "pipeline doesn't gather. Use method=instant, quarot, convrot or rtn, or add "
                "method.branch=null method.sensitive=null; for a calibrated model leave out "
                "preset=instant, or pipeline=instant"
            )

    def check(self) -> None:
        """Refuse, before anything runs, an incomplete model, an argument it won't take, what the
        shapes alone can refute, and a pipeline that fails when it is called.
        """
        self.model.check()
        sites = self.model.sites()
        refuse_few(self.model.shapes(), sites, self.least_packed, "round")
        check_plan(self.method, sites, 1, lambda _: 0)
        if self.rehearse:
            refuse_uncallable(self.model, "round.rehearse=false packs without this call")

    def run(self, out: Path) -> Mapping[str, float]:
        return in_units(self, out, {})

    def units(self) -> list[str]:
        return [line.site.name for line in self._planned().lines]

    def maker(self, out: Path, _: Sequence[str]) -> Make:
        device, weights = pick_device(self.device), self.model.weights()
        lines = {line.site.name: line for line in self._planned().lines}

        def read(site: Site) -> tuple[Tensor, Tensor | None]:
            return weights.stacked(site, device)

        def make(names: Iterable[str]) -> Iterator[Made]:
            sites = (lines[name].site for name in names)
            # Beside a GPU the next site is read meanwhile; a CPU would not compute faster.
            here = ((site, read(site)) for site in sites)
            for site, found in ahead(read, sites, device) if device.type == "cuda" else here:
                tensors = round_site(*found, lines[site.name])
                del found
                yield site.name, [save_site(out / "sites", site.name, tensors)]

        return make

    def merge(self, units: Units) -> Mapping[str, float]:
        planned = self._planned()
        planned.write(units.out)
        files = [units.out / "sites" / site_file(line.site.name) for line in planned.lines]
        loss = torch.cat([load_site(file)["loss"] for file in files])
        return planned.metrics(self.model) | {
            "sites": len(files),
            "relative_error": float(loss.mean()),
        }

    def advice(self) -> str:
        """Say what calibration would add to the packed model."""
        return advice(self.model.path)

    def expected(self, sites: Sequence[Site]) -> Mapping[str, int]:
        """Return the rank of each block site: none has one."""
        return {site.name: 0 for site in sites if site.kind == "block"}

    def _planned(self) -> Planned:
        return make_plan(self.method, self.model.sites(), lambda _: (0, ""))


def round_site(w_ND: Tensor, bias_N: Tensor | None, entry: SitePlan) -> dict[str, Tensor]:
    """Return the buffers of one packed linear, and ``loss``.

    w_ND    float32, [N, D], weights of all linears
    bias_N  float32, [N], or None

    Raises NumericalError naming the site if its weights are too large for float32 to square.
    """
    rotation = Rotation.cut({}, entry.spec)
    main, protected = rotation.weights(w_ND)
    squares = main.square().sum()
    if not bool(squares.isfinite()):
        raise NumericalError(
            f"site {entry.site.name}: its weights reach {float(w_ND.abs().max()):.3g}, whose "
            "squares are beyond float32; no network computes with them, the checkpoint is damaged"
        )
    rounded = nearest(main, entry.spec, clip=entry.clip, wp_NR=protected, bias_N=bias_N)
    if entry.rounding == "gptq" and entry.site.kind == "block":
        codes = guessed_codes(main, rounded.codes, rounded.step, entry.spec.weights.element)
        rounded = rounded._replace(codes=codes)
    lost = (rounded.values() - main).square().sum() / squares.clamp_min(1e-30)
    stored = rotation.stored(protected, bias_N) | rounded.stored(entry.spec)
    return stored | {"loss": lost.double().reshape(1)}
