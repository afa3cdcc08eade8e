"""Second moments and sampled rows of every site of the 16-bit model.

In two parts, each resumable. *Record*: the pipeline generates latents for the calibration prompts,
and a plan picks calls of the denoiser out of all prompts and timesteps. *Replay*: these calls pass
through the transformer block by block (dirotq/calibrate/replay.py), so that one block's weights and
moments are in memory at a time, however large the model.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import zarr

from dirotq.calibrate.trajectory import Trajectories
from dirotq.device import compute_dtype, pick_device, refuse_vram
from dirotq.errors import ConfigError, NumericalError
from dirotq.models.call import PROBE, PROBES, Call, by_part, call_files, load_calls, save_calls
from dirotq.pipeline.divided import Make, in_units
from dirotq.pipeline.sizes import parse_vram
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.units import Made, Units
from dirotq.quantize import memory
from dirotq.quantize.replayed_moments import TREES, ReplayedMoments
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import Prompt, PromptSet

log = logging.getLogger(__name__)

GOLDEN = 0.6180339887498949
RECORD = "calls "
"""Before a shard's number: the name of a unit."""


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Accumulate S = XᵀX / T per site over calibration calls (docs/method.md Eq. 1).

    ``batch``   prompts per pipeline call; one batch is one shard, the unit of resuming. Pipelines
                to which a list of pictures is one prompt's references get one prompt
    ``calls``   denoiser calls to record (a call for a batch of four counts as four), spread evenly
                over all prompts and timesteps (:func:`chosen_calls`)
    ``rows``    activation rows kept per site, for proofs and per-layer errors
    ``vram``    GPU memory to stay within ("24GB"), or None for what is free

    Writes ``moments.zarr`` (per site the block triangle of S in float32, or its rows where they are
    fewer; dirotq/quantize/moments.py), ``rows.zarr`` (bfloat16 [rows, D], with the timestep of each
    row), ``peaks.zarr`` (float32 [D], the largest magnitude of each channel) and ``probe.*``
    (PROBES calls of each denoiser).

    Raises NumericalError naming the site whose activations are not finite or that saw no token.
    """

    version: ClassVar[str] = "4"
    resumable: ClassVar[bool] = True
    what: ClassVar[str] = "capture: record"
    needs = memory.capture

    model: DiffusersModel
    prompts: PromptSet
    batch: int
    calls: int
    rows: int
    vram: str | int | None = untracked()
    device: str = untracked()
    weighting: str = field(init=False, default="pooled")
    """Timesteps that count alike gained nothing beside levels (docs/quality.md): a constant of the
    recipe."""

    def __post_init__(self) -> None:
        if min(self.batch, self.calls, self.rows) < 1:
            raise ConfigError(
                f"capture.batch={self.batch}, capture.calls={self.calls}, "
                f"capture.rows={self.rows}: each must be at least 1"
            )
        if self.vram is not None:
            parse_vram(self.vram, "capture.vram")

    def check(self) -> None:
        """Refuse, before anything runs, an incomplete model, or an argument it won't take."""
        if self.vram is not None and self.device == "cpu":  # of auto, the machine that computes
            refuse_vram(self.vram, pick_device("cpu"), "capture.vram")
        self.model.check()
        self.model.check_prompts(self.prompts, self.batch)

    def run(self, out: Path) -> Mapping[str, float]:
        return in_units(self, out, {})

    def units(self) -> list[str]:
        return list(_shards(self))

    def maker(self, out: Path, names: Sequence[str]) -> Make:
        device, shards = pick_device(self.device), _shards(self)
        places = {name: index for index, name in enumerate(shards)}
        wanted = -(-self.calls // _batch(self))
        if self.vram is not None:
            refuse_vram(self.vram, device, "capture.vram")
        vram = None if self.vram is None else parse_vram(self.vram, "capture.vram")
        source = Trajectories(self.model, compute_dtype(device), device, vram)
        source.encode([shards[name] for name in names])
        source.load_transformer()

        def make(names: Iterable[str]) -> Iterator[Made]:
            for name in names:
                choose = partial(chosen_calls, places[name], len(shards), wanted=wanted)
                try:
                    recorded = source.record(shards[name], choose)
                except NumericalError:
                    _name_the_site(self, out / f"diagnosis of {name}", source.made)
                    raise
                file = name.removeprefix(RECORD)
                save_calls(out / "calls", file, recorded)
                yield name, call_files(out / "calls", file)

        return make

    def followed(self) -> ReplayedMoments:
        return ReplayedMoments(
            model=self.model, shards=_files(_shards(self)), rows=self.rows,
            vram=self.vram, device=self.device,
        )  # fmt: skip

    def merge(self, units: Units) -> Mapping[str, float]:
        out, shards, sites = units.out, _shards(self), self.model.sites()
        # Roots of the trees are no unit's: a run that finds all units finished makes them here.
        moments, *_ = (zarr.open_group(out / name, mode="a") for name in TREES)
        tokens = {s: int(str(moments[s.name].attrs["tokens"])) for s in sites}
        calls = load_calls(out / "calls", _files(shards))
        groups = by_part(calls).values()
        probes = [group[i * len(group) // PROBES] for group in groups for i in range(PROBES)]
        save_calls(out, PROBE, probes)
        shutil.rmtree(out / "calls")
        return {
            "prompts": sum(map(len, shards.values())),
            "calls": len(calls) * _batch(self),
            "sites": len(tokens),
            "tokens": max(tokens.values()),
            # No more tokens than channels: such a site's basis is not determined by its data alone.
            "rank_deficient": sum(
                seen < s.in_features for s, seen in tokens.items() if s.kind == "block"
            ),
        }


def _shards(stage: Capture) -> dict[str, list[Prompt]]:
    """Return {unit: prompts of one pipeline call}."""
    prompts, batch = stage.prompts.load(), _batch(stage)
    starts = range(0, len(prompts), batch)
    return {f"{RECORD}{index:05d}": prompts[i : i + batch] for index, i in enumerate(starts)}


def _batch(stage: Capture) -> int:
    """Return how many prompts make one call: one by one where each starts from its pictures."""
    return stage.model.batch(stage.prompts.load(), stage.batch)


def _files(shards: Iterable[str]) -> list[str]:
    """Name the files of their recorded calls."""
    return [name.removeprefix(RECORD) for name in shards]


def chosen_calls(shard: int, shards: int, made: int, wanted: int) -> list[int]:
    """Which of the ``made`` denoiser calls of one shard to record.

    ``wanted`` calls are spread evenly over ``shards``; within a shard they are equally spaced, and
    the first one's place follows the golden ratio from shard to shard, so that all timesteps (and
    both branches of guidance, where they are separate calls) are covered alike. A shard asked for
    more than it made gives all.
    """
    quota = (shard + 1) * wanted // shards - shard * wanted // shards
    if quota >= made:
        return list(range(made))
    offset = (0.5 + shard * GOLDEN) % 1
    return [int((k + offset) * made / quota) for k in range(quota)]


def _name_the_site(stage: Capture, out: Path, calls: list[Call]) -> None:
    """Raise NumericalError for the first site that is not finite in a failed generation."""
    # The first call that went wrong had good inputs; those of its successors are its output.
    calls = [c for c in calls if all(bool(t.isfinite().all()) for t in c.tensors())]
    replay = stage.followed()
    out.mkdir()
    try:
        for _ in replay.made(out, calls, replay.units()):
            pass
    finally:
        shutil.rmtree(out)
