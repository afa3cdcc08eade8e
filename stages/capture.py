"""Second moments and sampled rows of every site of the 16-bit model.

In two parts, each resumable. *Record*: the pipeline generates latents for the calibration prompts,
and a plan picks calls of the denoiser out of all prompts and timesteps. *Replay*: these calls pass
through the transformer block by block (dirotq/calibrate/replay.py), so that one block's weights and
moments are in memory at a time, however large the model.
"""

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import zarr

from dirotq.calibrate.recorder import Recorder, Seen
from dirotq.calibrate.replay import Replay
from dirotq.calibrate.trajectory import Trajectories
from dirotq.device import compute_dtype, pick_device
from dirotq.errors import ConfigError, NumericalError
from dirotq.models.call import PROBE, PROBES, Call, call_files, load_calls, save_calls, timestep
from dirotq.models.family import Site
from dirotq.pipeline.divided import Make, in_units
from dirotq.pipeline.sizes import parse_bytes
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.units import Made, Units
from dirotq.progress import track
from dirotq.quantize import memory
from dirotq.quantize.moments import TIMESTEPS, add_earlier, read_stored, write_moment
from dirotq.quantize.tensors import create_array, read_array, write_array, write_rows
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import Prompt, PromptSet

log = logging.getLogger(__name__)

GOLDEN = 0.6180339887498949
RECORD = "calls "
REPLAY = "replay "
"""Before a shard's number, and before a block's name: names of units."""
TREES = ("moments.zarr", "rows.zarr", "peaks.zarr")


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Accumulate S = XᵀX / T per site over calibration calls (docs/method.md Eq. 1).

    ``batch``   prompts per pipeline call; one batch is one shard, the unit of resuming
    ``calls``   denoiser calls to record (a call for a batch of four counts as four), spread evenly
                over all prompts and timesteps (:func:`chosen_calls`)
    ``rows``    activation rows kept per site, for proofs and per-layer errors
    ``weighting``  ``pooled``: every token counts by its energy, as Eq. 1 says; ``leveled``: each
                recorded call is divided by its root mean square at the site first, so that no
                timestep outweighs another
    ``vram``    GPU memory to stay within ("24GB"), or None for what is free

    Writes ``moments.zarr`` (per site the block triangle of S in float32, or its rows where they are
    fewer; dirotq/quantize/moments.py), ``rows.zarr`` (bfloat16 [rows, D], with the timestep of each
    row), ``peaks.zarr`` (float32 [D], the largest magnitude of each channel) and ``probe.*``
    (PROBES calls).

    Raises NumericalError naming the site whose activations are not finite or that saw no token.
    """

    version: ClassVar[str] = "3"
    resumable: ClassVar[bool] = True
    what: ClassVar[str] = "capture: record"
    needs = memory.capture

    model: DiffusersModel
    prompts: PromptSet
    batch: int
    calls: int
    rows: int
    weighting: Literal["pooled", "leveled"]
    vram: str | int | None = untracked()
    device: str = untracked()

    def __post_init__(self) -> None:
        if min(self.batch, self.calls, self.rows) < 1:
            raise ConfigError(
                f"capture.batch={self.batch}, capture.calls={self.calls}, "
                f"capture.rows={self.rows}: each must be at least 1"
            )
        if self.weighting not in ("pooled", "leveled"):
            raise ConfigError(
                f"capture.weighting={self.weighting!r} is unknown; use 'pooled' or 'leveled'"
            )
        if self.vram is not None:
            parse_bytes(self.vram)

    def check(self) -> None:
        """Refuse, before anything runs, an incomplete model, or an argument it won't take."""
        self.model.check()

    def run(self, out: Path) -> Mapping[str, float]:
        return in_units(self, out, {})

    def units(self) -> list[str]:
        return list(_shards(self))

    def maker(self, out: Path, names: Sequence[str]) -> Make:
        device, shards = pick_device(self.device), _shards(self)
        places = {name: index for index, name in enumerate(shards)}
        wanted = -(-self.calls // self.batch)
        vram = None if self.vram is None else parse_bytes(self.vram)
        source = Trajectories(self.model, compute_dtype(device), device, vram)
        source.encode([shards[name] for name in names])
        source.load_transformer()

        def make(names: Iterable[str]) -> Iterator[Made]:
            for name in names:
                choose = partial(chosen_calls, places[name], len(shards), wanted=wanted)
                try:
                    recorded = source.record(shards[name], choose)
                except NumericalError:
                    _name_the_site(self, out / f"diagnosis of {name}", device, source.made)
                    raise
                file = name.removeprefix(RECORD)
                save_calls(out / "calls", file, recorded)
                yield name, call_files(out / "calls", file)

        return make

    def merge(self, units: Units) -> Mapping[str, float]:
        """Replay the calls that were recorded: blocks follow each other."""
        device, out, shards = pick_device(self.device), units.out, _shards(self)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        calls = load_calls(out / "calls", [name.removeprefix(RECORD) for name in shards])
        tokens = replay_calls(self, out, units, device, calls)
        save_calls(out, PROBE, [calls[i * len(calls) // PROBES] for i in range(PROBES)])
        shutil.rmtree(out / "calls")
        return {
            "prompts": sum(map(len, shards.values())),
            "calls": len(calls) * self.batch,
            "sites": len(tokens),
            "tokens": max(tokens.values()),
            # No more tokens than channels: such a site's basis is not determined by its data alone.
            "rank_deficient": sum(
                seen < s.in_features for s, seen in tokens.items() if s.kind == "block"
            ),
        }


def _shards(stage: Capture) -> dict[str, list[Prompt]]:
    """Return {unit: prompts of one pipeline call}."""
    prompts = stage.prompts.load()
    starts = range(0, len(prompts), stage.batch)
    return {
        f"{RECORD}{index:05d}": list(prompts[i : i + stage.batch]) for index, i in enumerate(starts)
    }


def replay_calls(
    stage: Capture, out: Path, units: Units, device: torch.device, calls: Sequence[Call]
) -> dict[Site, int]:
    """Store what every site sees of the calls; return {site: tokens}.

    A block is a unit where one pass takes all calls. Several passes add to what is there, and how
    many calls one takes depends on free memory: interrupted, they start over.
    """
    sites, mask = stage.model.sites(), stage.model.family.mask
    replay = Replay.of(stage.model, device, compute_dtype(device))
    vram = None if stage.vram is None else parse_bytes(stage.vram)
    at_once = replay.make_room(calls[0], len(calls), vram)
    passes = [range(i, min(i + at_once, len(calls))) for i in range(0, len(calls), at_once)]
    if len(passes) > 1:
        log.info("capture: %d passes of up to %d calls each", len(passes), at_once)
        units.forget(REPLAY)
    left = {
        block: [site for site in sites if site.block == block]
        for block in ("", *replay.blocks)
        if not units.done(REPLAY + block)
    }
    trees = {name: zarr.open_group(out / name, mode="a") for name in TREES}

    def finish(block: str) -> None:
        if len(passes) == 1 and block in left:
            inside = [out / name / site.name for name in TREES for site in left[block]]
            units.finish(REPLAY + block, inside)

    for number, indices in enumerate(passes if left else []):
        rows = range(*(i * stage.rows // len(calls) for i in (indices.start, indices.stop)))
        recorder = Recorder(
            replay=replay,
            calls=[calls[i] for i in indices],
            rows=len(rows),
            seed=number,
            mask=mask,
            level=stage.weighting == "leveled",
        )
        times = [timestep(replay.transformer, call) for call in recorder.calls]
        store = partial(_store, trees, rows=rows, of=stage.rows, times=times, first=number == 0)
        what = "capture: replay" + (f" {number + 1} of {len(passes)}" if len(passes) > 1 else "")
        with recorder.watching(left.get("", [])) as seen_outside:
            for step in track(replay.steps(recorder.calls), what, total=len(replay.blocks)):
                with recorder.watching(left.get(step.block, [])) as seen:
                    step.run()
                store(seen)
                finish(step.block)
                del seen  # before the next block's weights come
        store(seen_outside)
        finish("")
    return {s: int(str(trees["moments.zarr"][s.name].attrs["tokens"])) for s in sites}


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


def _store(
    trees: Mapping[str, zarr.Group],
    seen: Mapping[Site, Seen],
    *,
    rows: range,
    of: int,
    times: Sequence[float | None],
    first: bool,
) -> None:
    """Write what one pass has seen of sites, together with what earlier passes wrote.

    rows   places of this pass's sampled rows among all ``of``
    times  the timestep of each call of this pass
    """
    moments, samples, absmax = (trees[name] for name in TREES)
    for site, one in seen.items():
        if not first:
            earlier = read_stored(moments, site.name), read_array(absmax, site.name)
            add_earlier(one, site.in_features, *earlier)
        stacked = torch.cat(one.whole) if one.total is None else None
        write_moment(
            moments, site.name, site.in_features, one.tokens, total=one.total, rows=stacked
        )
        assert one.absmax is not None
        write_array(absmax, site.name, one.absmax)
        if first:
            create_array(samples, site.name, (of, site.in_features), torch.bfloat16)
        if rows:
            sample = torch.cat(one.sample)
            repeats = -(-len(rows) // len(sample))
            write_rows(samples, site.name, rows.start, sample.repeat(repeats, 1)[: len(rows)])
            told = [times[call] for call in one.sampled * repeats][: len(rows)]
            attributes: Any = samples[site.name].attrs
            attributes[TIMESTEPS] = [*attributes.get(TIMESTEPS, []), *told]


def _name_the_site(stage: Capture, out: Path, device: torch.device, calls: list[Call]) -> None:
    """Raise NumericalError for the first site that is not finite in a failed generation."""
    # The first call that went wrong had good inputs; those of its successors are its output.
    calls = [c for c in calls if all(bool(t.isfinite().all()) for t in c.tensors())]
    out.mkdir()
    try:
        replay_calls(stage, out, Units(out, stage), device, calls)
    finally:
        shutil.rmtree(out)
