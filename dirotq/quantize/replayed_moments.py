"""The second half of a capture: recorded calls pass the transformer, and what sites see is stored.

Blocks follow each other, and of each the units of work are calls. Several processes take calls
that follow each other, and hand on their sums (dirotq/calibrate/relay.py): the last one stores
them. So the sums are those of one process, rounded alike.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import zarr

from dirotq.calibrate.aside import Aside
from dirotq.calibrate.recorder import Recorder, Seen
from dirotq.calibrate.relay import END, Relay
from dirotq.calibrate.replay import Replay
from dirotq.device import compute_dtype, pick_device, release
from dirotq.errors import ConfigError
from dirotq.models.call import Call, by_part, load_calls, timestep
from dirotq.models.denoisers import prefix
from dirotq.models.family import Site
from dirotq.pipeline.divided import Make, NotShared
from dirotq.pipeline.sizes import parse_bytes
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.units import Made
from dirotq.quantize.moments import TIMESTEPS, add_earlier, read_stored, write_moment
from dirotq.quantize.tensors import create_array, read_array, write_array, write_rows
from dirotq.sources.model import DiffusersModel

log = logging.getLogger(__name__)

REPLAY = "replay "
"""Before a block's name: the name of a unit. Sites in no block are the unit of the block ""."""
TREES = ("moments.zarr", "rows.zarr", "peaks.zarr")
Store = Callable[[Mapping[Site, Seen]], None]


@dataclass(frozen=True, kw_only=True)
class ReplayedMoments:
    """Replay the calls in ``<out>/calls`` and store what every site sees; a unit is a block.

    shards        names of the calls' files
    rows, vram  as of the stage `capture`
    index, count  which part of the calls this process takes;  meeting  where it meets the others
    """

    what: ClassVar[str] = "capture: replay"

    model: DiffusersModel
    shards: Sequence[str]
    rows: int
    vram: str | int | None = untracked()
    device: str = untracked()
    index: int = untracked(default=0)
    count: int = untracked(default=1)
    meeting: str = untracked(default="")

    def units(self) -> list[str]:
        found = dict.fromkeys(site.block for site in self.model.sites())
        return [REPLAY + block for block in sorted(found, key=lambda block: not block)]

    def part(self, index: int, count: int, meeting: Path) -> "ReplayedMoments":
        return dataclasses.replace(self, index=index, count=count, meeting=str(meeting))

    def maker(self, out: Path, names: Sequence[str]) -> Make:
        release(pick_device(self.device))  # whoever recorded the calls
        calls = load_calls(out / "calls", self.shards)
        _refuse_idle(self.model.prefixes, by_part(calls))
        return partial(self.made, out, calls)

    def made(self, out: Path, calls: Sequence[Call], names: Iterable[str]) -> Iterator[Made]:
        """Store what the sites of the named units see of the calls.

        Several passes add to what is there, and finish units in the last one. Of several denoisers
        one follows the other.

        Raises NotShared if this process would need several passes for its part of the calls, or if
        there are several denoisers.
        """
        device = pick_device(self.device)
        replay = Replay.of(self.model, device, compute_dtype(device))
        left = {name.removeprefix(REPLAY): list[Site]() for name in names}
        for site in self.model.sites():
            if site.block in left:
                left[site.block].append(site)
        trees = {name: zarr.open_group(out / name, mode="a") for name in TREES if self._last}
        served = by_part(calls)
        if self.count > 1 and len(served) > 1:
            raise NotShared(f"the calls are of {' and '.join(served)}")
        for part, alike in served.items():
            own = {
                b: [s for s in inside if s.name.startswith(prefix(part))]
                for b, inside in left.items()
            }
            own = {block: inside for block, inside in own.items() if inside}
            for block in self._made_of(replay, trees, alike, own):
                if block or part == [*served][-1]:  # sites outside of blocks are one unit
                    yield REPLAY + block, [out / n / s.name for n in TREES for s in left[block]]

    def _made_of(
        self,
        replay: Replay,
        trees: Mapping[str, zarr.Group],
        calls: Sequence[Call],
        left: Mapping[str, Sequence[Site]],
    ) -> Iterator[str]:
        """Store what sites of one denoiser see of its calls; yield blocks that are finished."""
        passes = self._passes(replay, calls)
        for number, indices in enumerate(passes):
            rows = range(*(i * self.rows // len(calls) for i in (indices.start, indices.stop)))
            recorder = Recorder(
                replay=replay,
                calls=[calls[i] for i in indices],
                rows=len(rows),
                seed=number,
                mask=self.model.family.mask,
                complete=self._last,
            )
            times = [timestep(replay.transformer, call) for call in recorder.calls]
            store = partial(_store, trees, rows=rows, of=self.rows, times=times, first=number == 0)
            if len(passes) > 1:
                log.info("%s: pass %d of %d", self.what, number + 1, len(passes))
            for block in self._pass(recorder, left, store):
                if number == len(passes) - 1:
                    yield block

    @property
    def _last(self) -> bool:
        return self.index == self.count - 1

    def _passes(self, replay: Replay, calls: Sequence[Call]) -> list[range]:
        vram = None if self.vram is None else parse_bytes(self.vram, "capture.vram")
        share = -(-len(calls) // self.count)
        at_once = replay.make_room(calls[0], share, vram, self.count)
        if self.count > 1:
            if len(calls) < self.count or at_once < share:
                raise NotShared(f"there is no room for {share} of {len(calls)} calls at once")
            return [range(len(calls))]
        return [range(i, min(i + at_once, len(calls))) for i in range(0, len(calls), at_once)]

    def _pass(
        self, recorder: Recorder, left: Mapping[str, Sequence[Site]], store: Store
    ) -> Iterator[str]:
        """Let this process's part of the calls pass once; yield blocks that are stored.

        A block is stored, or handed on, in a thread while the calls pass the next one.
        """
        replay, calls = recorder.replay, recorder.calls
        start, stop = (len(calls) * i // self.count for i in (self.index, self.index + 1))
        steps = replay.steps(calls[start:stop], first=start)
        relay = Relay(Path(self.meeting), self.index, self.count, replay.device)
        aside = Aside(replay.device)

        def settle(
            block: str, seen: Mapping[Site, Seen], beside: Mapping[Site, Seen], passed: Any
        ) -> list[str]:
            with aside.after(passed):
                if not self._last:
                    relay.hand(block, {**seen, **beside})
                    return []
                store(seen)
            return [block] if block in left else []

        with recorder.watching(left.get("", [])) as outside, ThreadPoolExecutor(1) as pool, relay:
            relay.take("", outside)
            waiting: Future[list[str]] | None = None
            for step in steps:
                if waiting is None:  # what comes before all blocks has happened
                    relay.hand("", outside)
                before = {site: one.tokens for site, one in outside.items()}
                with recorder.watching(left.get(step.block, [])) as seen:
                    relay.take(step.block, {**seen, **outside})
                    step.run()
                if waiting is not None:
                    yield from waiting.result()
                beside = {s: one for s, one in outside.items() if one.tokens != before[s]}
                waiting = pool.submit(settle, step.block, seen, beside, aside.mark())
                del seen  # as soon as it is stored
            if waiting is not None:
                yield from waiting.result()
            relay.take(END, {})
            relay.hand(END, {})
        if self._last and "" in left:
            store(outside)
            yield ""


def _refuse_idle(parts: Sequence[str], served: Mapping[str, Sequence[Call]]) -> None:
    """Refuse a pipeline one of whose denoisers serves none of the recorded steps."""
    if idle := [part for part in parts if part not in served]:
        raise ConfigError(
            f"none of the recorded calls is one of {', '.join(idle)}, so it can't be calibrated: "
            f"the pipeline called {', '.join(served)} at all of them. Take more steps "
            "(num_inference_steps of model.call or model.sample), record more calls "
            "(capture.calls), or look at boundary_ratio in model_index.json, which divides the "
            "steps"
        )


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
