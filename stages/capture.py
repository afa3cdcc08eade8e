"""Second moments and sampled rows of every site of the 16-bit model.

In two parts, each resumable. *Record*: the pipeline generates latents for the calibration prompts,
and a plan picks calls of the denoiser out of all prompts and timesteps. *Replay*: these calls pass
through the transformer block by block (dirotq/calibrate/replay.py), so that one block's weights and
moments are in memory at a time, however large the model.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
import zarr
from torch import Tensor, nn

from dirotq.calibrate.recorder import Recorder, Seen, refuse_empty_or_damaged
from dirotq.calibrate.replay import Walk
from dirotq.calibrate.trajectory import Trajectories
from dirotq.device import compute_dtype, free_host_memory, pick_device
from dirotq.errors import ConfigError, NumericalError
from dirotq.kernels import second_moment
from dirotq.models.call import PROBE, PROBES, Call, call_files, load_calls, save_calls
from dirotq.models.family import Site
from dirotq.pipeline.sizes import parse_bytes
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.units import Units
from dirotq.progress import track
from dirotq.quantize import memory
from dirotq.quantize.memory import HOST_SHARE, STATE_SHARE, calls_at_once
from dirotq.quantize.moments import read_stored, write_moment
from dirotq.quantize.tensors import create_array, read_array, write_rows
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import PromptSet

log = logging.getLogger(__name__)

GOLDEN = 0.6180339887498949
REPLAY = "replay "
"""Before a block's name, the name of its unit."""


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
    fewer; dirotq/quantize/moments.py), ``rows.zarr`` (bfloat16 [rows, D]), ``peaks.zarr`` (float32
    [D], the largest magnitude of each channel) and ``probe.*`` (PROBES calls).

    Raises NumericalError naming the site whose activations are not finite or that saw no token.
    """

    version: ClassVar[str] = "3"
    resumable: ClassVar[bool] = True

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
        device, units = pick_device(self.device), Units(out, self)
        calls, prompts = self._record(out, units, device)
        sites = self.model.sites()
        tokens = self._replay(out, units, device, sites, calls)
        save_calls(out, PROBE, [calls[i * len(calls) // PROBES] for i in range(PROBES)])
        shutil.rmtree(out / "calls")
        return {
            "prompts": prompts,
            "calls": len(calls) * self.batch,
            "sites": len(sites),
            "tokens": max(tokens.values()),
            # No more tokens than channels: such a site's basis is not determined by its data alone.
            "rank_deficient": sum(tokens[s.name] < s.dim for s in sites if s.kind == "block"),
        }

    def needs(self, work: memory.Workload, machine: memory.Machine) -> memory.Needs:
        return memory.capture(work, machine, self.vram, self.rows)

    def _record(self, out: Path, units: Units, device: torch.device) -> tuple[list[Call], int]:
        """The calls to replay, from the shards that are on disk and those that are not yet."""
        prompts = self.prompts.load()
        shards = [prompts[i : i + self.batch] for i in range(0, len(prompts), self.batch)]
        names = [f"{index:05d}" for index in range(len(shards))]
        todo = units.todo(range(len(shards)), lambda i: f"calls {names[i]}", "capture: record")
        if todo:
            budget = None if self.vram is None else parse_bytes(self.vram)
            source = Trajectories(self.model, compute_dtype(device), device, budget)
            source.encode([shards[i] for i in todo])
            source.load_transformer()
            wanted = -(-self.calls // self.batch)
            for index in track(todo, "capture: record"):
                try:
                    choose = partial(chosen_calls, index, len(shards), wanted=wanted)
                    recorded = source.record(shards[index], choose)
                except NumericalError:
                    self._name_the_site(out / "diagnosis", device, source.made)
                    raise
                save_calls(out / "calls", names[index], recorded)
                units.finish(f"calls {names[index]}", call_files(out / "calls", names[index]))
            del source
            if device.type == "cuda":
                torch.cuda.empty_cache()
        return load_calls(out / "calls", names), len(prompts)

    def _name_the_site(self, out: Path, device: torch.device, calls: list[Call]) -> None:
        """Raise NumericalError for the first site that is not finite in a failed generation."""
        # The first call that went wrong had good inputs; those of its successors are its output.
        calls = [c for c in calls if all(bool(t.isfinite().all()) for t in c.tensors())]
        out.mkdir()
        try:
            self._replay(out, Units(out, self), device, self.model.sites(), calls)
        finally:
            shutil.rmtree(out)

    def _replay(
        self,
        out: Path,
        units: Units,
        device: torch.device,
        sites: list[Site],
        calls: list[Call],
    ) -> dict[str, int]:
        """Moments and rows of all sites on disk; tokens seen by each."""
        transformer = self.model.skeleton()
        weights = self.model.weights()
        blocks = list(dict.fromkeys(site.block for site in sites if site.block))
        walk = Walk(transformer, weights, blocks, device=device, dtype=compute_dtype(device))
        at_once, walk.park = _sweep_size(walk, calls, self.vram, device)
        sweeps = [range(i, min(i + at_once, len(calls))) for i in range(0, len(calls), at_once)]
        if len(sweeps) > 1:
            log.info("capture: %d sweeps of up to %d calls each", len(sweeps), at_once)
        ledger = _Ledger(out, units, sites, self.rows, len(calls), at_once)
        steps = iter(track(range(len(sweeps) * len(blocks)), "capture: replay"))
        for number, sweep in enumerate(sweeps):
            if not all(map(ledger.has, ["", *blocks])):
                self._sweep(number, sweep, calls, walk, ledger, steps)
        next(steps, None)
        return ledger.tokens()

    def _sweep(
        self,
        number: int,
        sweep: range,
        calls: Sequence[Call],
        walk: Walk,
        ledger: "_Ledger",
        steps: Iterator[int],
    ) -> None:
        """Send one sweep's calls through the network, every block recorded as they pass."""
        present = [calls[i] for i in sweep]
        watch = partial(
            Recorder, mask=self.model.family.mask, level=self.weighting == "leveled", seed=number
        )

        @contextmanager
        def visit(block: str, part: nn.Module | None = None) -> Iterator[None]:
            with ledger.recording(number, block, sweep, present, walk, watch):
                yield
            next(steps, None)

        with visit(""):
            walk.run(present, visit)


class _Ledger:
    """What the replay has put on disk: one unit per finished block.

    Several sweeps add to what is there, and how many calls one takes depends on free memory: an
    interrupted replay goes on only where a single sweep took all calls, and starts over elsewhere.
    """

    def __init__(
        self, out: Path, units: Units, sites: Sequence[Site], rows: int, calls: int, at_once: int
    ) -> None:
        self.sites, self.rows, self.calls, self.units = sites, rows, calls, units
        self.single = at_once >= calls
        if not self.single:
            units.forget(REPLAY)
        self.trees = [out / f"{name}.zarr" for name in ("moments", "rows", "peaks")]
        self.moments, self.samples, self.peaks = (
            zarr.open_group(tree, mode="a") for tree in self.trees
        )

    def has(self, block: str) -> bool:
        return self.units.done(f"{REPLAY}{block}")

    def tokens(self) -> dict[str, int]:
        return {site.name: int(str(self.moments[site.name].attrs["tokens"])) for site in self.sites}

    @contextmanager
    def recording(
        self,
        sweep: int,
        block: str,
        indices: range,
        calls: list[Call],
        walk: Walk,
        watch: Callable[..., Recorder],
    ) -> Iterator[None]:
        """Record the block's sites, unless that was done before; then write them."""
        if self.has(block):
            yield
            return
        sites = [site for site in self.sites if site.block == block]
        start, stop = (i * self.rows // self.calls for i in (indices.start, indices.stop))
        recorder = watch(walk.transformer, sites, calls, lambda: walk.current, rows=stop - start)
        with recorder:
            yield
        refuse_empty_or_damaged(sites, recorder.seen)
        for site in sites:
            self._write(site, recorder.seen[site.name], sweep, start, stop)
        if self.single:
            folders = [tree / site.name for tree in self.trees for site in sites]
            self.units.finish(f"{REPLAY}{block}", folders)

    def _write(self, site: Site, seen: Seen, sweep: int, start: int, stop: int) -> None:
        total, rows, tokens = seen.total, seen.whole, seen.tokens
        if sweep:
            total, rows, tokens = _merged(read_stored(self.moments, site.name), seen, site.dim)
        stacked = torch.cat(rows) if total is None else None
        write_moment(self.moments, site.name, site.dim, tokens, total=total, rows=stacked)
        assert seen.peak is not None
        peak = seen.peak.cpu()
        if sweep:
            peak = torch.maximum(peak, read_array(self.peaks, site.name))
        create_array(self.peaks, site.name, (site.dim,), torch.float32)
        write_rows(self.peaks, site.name, 0, peak)
        if not sweep:
            create_array(self.samples, site.name, (self.rows, site.dim), torch.bfloat16)
        if stop > start:
            sample = torch.cat(seen.sample)
            repeats = -(-(stop - start) // len(sample))
            write_rows(self.samples, site.name, start, sample.repeat(repeats, 1)[: stop - start])


def _merged(
    stored: tuple[Tensor, dict], seen: Seen, dim: int
) -> tuple[Tensor | None, list[Tensor], int]:
    """Earlier sweeps' share of a site and this one's, together."""
    earlier, attributes = stored
    tokens = int(attributes["tokens"]) + seen.tokens
    if seen.total is None and attributes["form"] == "rows":
        return None, [earlier, *(rows.cpu() for rows in seen.whole)], tokens
    device = seen.total.device if seen.total is not None else seen.whole[0].device
    total = second_moment.new(dim, device)
    for rows in seen.whole:
        second_moment.accumulate(total, rows)
    if seen.total is not None:
        total += seen.total
    if attributes["form"] == "rows":
        second_moment.accumulate(total, earlier.to(device))
    else:
        total += earlier.to(device) * int(attributes["tokens"])
    return total, [], tokens


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


def _sweep_size(
    walk: Walk, calls: Sequence[Call], vram: str | int | None, device: torch.device
) -> tuple[int, bool]:
    """How many calls to keep on their way at a time, and whether to park them in host memory."""
    each, host = max(walk.state_bytes(calls[0]), 1), int(HOST_SHARE * free_host_memory())
    if device.type == "cpu":
        return calls_at_once(each, len(calls), host, host)[0], False
    limit = torch.cuda.mem_get_info(device)[0] if vram is None else parse_bytes(vram)
    room = int(STATE_SHARE * limit) - torch.cuda.memory_allocated(device)
    return calls_at_once(each, len(calls), room, host)
