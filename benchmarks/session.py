"""One run of `make bench-flux` or `make bench-models`: who is on the GPU, what was measured.

Contestants are alone on the GPU, so that peaks are theirs. One failing costs its own rows only.
"""

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dirotq
from dirotq.benchmarks import contestants as made
from dirotq.benchmarks import forward_timing, full_size, kernel_categories, whole_images
from dirotq.benchmarks.forward_rows import (
    COMPILED,
    EAGER,
    FOLDER,
    FP8,
    FUSED,
    SYNTHETIC,
    UNFUSED,
    W4A8,
    Row,
    find,
)
from dirotq.benchmarks.model_inputs import Case, inputs
from dirotq.benchmarks.ways import BF16, NO_GRAPHS, PACKED, PACKED_ATTENTION, PLAIN, WAYS, Undo
from dirotq.device import pick_device

MAIN = Case("flux", 1024)
COMPARED = ((FUSED, UNFUSED), (FUSED, EAGER), (UNFUSED, EAGER), (W4A8, EAGER), (FP8, EAGER),
            (COMPILED, EAGER), (NO_GRAPHS, PACKED), (PLAIN, PACKED),
            (PACKED_ATTENTION, PACKED))  # fmt: skip
"""Pairs whose results are compared: a path that computes something else shows as a large error."""


CALIBRATION = ("prompts.calibration.count=2", "capture.calls=8")
"""Few calls: they decide what the numbers are, not how long a forward takes."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where generated models are made, and the store that packs them; whatever is there is used."""

    models: Path
    store: str
    synthetic: bool = False
    overrides: tuple[str, ...] = ()

    def original(self, model: str) -> Path:
        """Return the folder of the generated 16-bit pipeline."""
        return full_size.generated(model, self.models, 1.0, pick_device("auto"))

    def packed(self, model: str, preset: str) -> Path:
        """Return the folder that our own pipeline packs by a method."""
        began = time.monotonic()
        folder = dirotq.compress(
            self.original(model), *CALIBRATION, *self.overrides, method=preset, store=self.store,
            until="pack",
        ).folder  # fmt: skip
        assert folder is not None
        print(f"packed {model}, {preset}: {folder} in {time.monotonic() - began:.0f} s", flush=True)
        return folder


@dataclass
class Session:
    """Measures, and hands every row to ``say`` as soon as it is known."""

    places: Places
    say: Callable[[Row], None]
    device: str = "cuda"
    rows: list[Row] = field(default_factory=list)
    held: tuple[str, str, int | None] | None = None
    module: Any = None
    undo: Undo | None = None
    """Gives the module that is held back to whoever runs the same weights in another way."""
    outputs: dict[tuple[str, Case], Tensor] = field(default_factory=dict)
    tried: set[tuple[str, Case]] = field(default_factory=set)
    broken: dict[tuple[str, str, int | None], str] = field(default_factory=dict)
    """Contestants that could not be made, with the reason: they are not tried again."""

    def add(self, row: Row) -> None:
        """Keep a row and say it."""
        self.rows.append(row)
        self.say(row)

    def add_all(self, section: str, case: str, contestant: str, found: Iterable[Row]) -> None:
        """Add rows as a generator makes them; if it fails, a row that says so."""
        try:
            for row in found:
                self.add(row)
        except Exception as error:  # noqa: BLE001 (what fails must not cost the other rows)
            self._failed(section, case, contestant, error)

    def forward(self, who: str, case: Case = MAIN) -> None:
        """Time one contestant in one case, unless this run has tried to."""
        if (who, case) in self.tried:
            return
        self.tried.add((who, case))
        try:
            module = self.contestant(who, case)
            x = inputs(case, module.config, self.device)
            done = forward_timing.timed(module, x)
        except Exception as error:  # noqa: BLE001
            self._failed("forward", str(case), who, error)
            return
        row = self._row("forward", case, who, value=done.ms.p50)
        self.add(replace(row, p20=done.ms.p20, p80=done.ms.p80, first_s=done.first_s))
        weights = made.weight_bytes(module) / 1e9
        self.add(self._row("weights", case, who, value=weights))
        rest = done.peak / 1e9 - weights  # less than nothing where weights lie in host memory
        note = f"{rest:.2f} of it workspace and activations" if rest > 0 else ""
        self.add(self._row("peak", case, who, value=done.peak / 1e9, note=note))
        self.add(self._row("reserved", case, who, value=done.reserved / 1e9))
        self._compare(who, case, done.output)

    def profile(self, who: str, case: Case = MAIN) -> None:
        """Say where the time of one call goes, by category and by kernel."""
        wall = find(self.rows, "forward", str(case), who)
        if wall is None or wall.value is None:
            return
        try:
            module = self.contestant(who, case)
            seen = forward_timing.kernels(module, inputs(case, module.config, self.device))
        except Exception as error:  # noqa: BLE001
            self._failed("profile", str(case), who, error)
            return
        for name, ms in kernel_categories.by_category(seen, wall.value).items():
            self.add(self._row("profile", case, who, value=ms, what=name))
        for name, ms, runs in kernel_categories.longest(seen):
            kind = kernel_categories.category(name)
            note = f"{runs} runs; {kind}"
            self.add(self._row("kernel", case, who, value=ms, what=name[:100], note=note))

    def again(self, who: str, case: Case) -> None:
        """Time the first call alone: what a process takes that finds compiled code on disk."""
        try:
            module = self.contestant(who, case)
            x = inputs(case, module.config, self.device)
            seconds, _ = forward_timing.first(module, x)
        except Exception as error:  # noqa: BLE001
            self._failed("warm", str(case), who, error)
            return
        self.add(self._row("warm", case, who, value=seconds))

    def image(self, who: str, case: Case, make: Callable[[], whole_images.Whole]) -> None:
        """Time whole images of one contestant; ``make`` gives the rest of its pipeline."""
        try:
            module = self.contestant(who, case)
            for part, seconds in whole_images.seconds(make(), module, case.side):
                self.add(self._row("image", case, who, value=seconds, what=part))
        except Exception as error:  # noqa: BLE001
            self._failed("image", str(case), who, error)

    def contestant(self, who: str, case: Case) -> Any:
        """Return its transformer, alone on the GPU; RuntimeError if making it failed before."""
        wanted = who, *case.network
        if self.held == wanted:
            return self.module
        if reason := self.broken.get(wanted):
            raise RuntimeError(f"as before: {reason}")
        try:
            self._put(who, case)
            self.undo = WAYS[who].apply(self.module, case)
            self.held = wanted
        except Exception as error:
            self.broken[wanted] = f"{type(error).__name__}: {error}"
            raise
        return self.module

    def _put(self, who: str, case: Case) -> None:
        """Hold the weights that a contestant runs: those that are there, or new ones."""
        if self.held is not None and self.undo is not None:
            before, *network = self.held
            if WAYS[before].base == WAYS[who].base and tuple(network) == case.network:
                self.undo()
                made.collect()
                return
        self.drop()
        self.module = self._loaded(WAYS[who].base, case)

    def drop(self) -> None:
        """Free the GPU."""
        self.held = self.module = self.undo = None
        made.free()

    def _loaded(self, base: str, case: Case) -> Any:
        """Load a fresh transformer, as it comes from its folder."""
        model, places = case.model, self.places
        if places.synthetic:
            if base == BF16:
                return made.random_bf16(model, self.device, **case.changes)
            return made.random_packed(model, self.device, preset=base, **case.changes)
        if base == BF16:
            return made.loaded_bf16(model, places.original(model), self.device)
        return made.loaded(model, places.packed(model, base), self.device)

    def _compare(self, who: str, case: Case, output: Tensor) -> None:
        """Add errors against what else computed this case; synthetic networks are others."""
        self.outputs[who, case] = output.float().cpu()
        for left, right in COMPARED:
            other = {left: right, right: left}.get(who)
            if other is None or (other, case) not in self.outputs:
                continue
            if self.places.synthetic and WAYS[left].packed != WAYS[right].packed:
                continue
            got, want = self.outputs[left, case], self.outputs[right, case]
            error = float((got - want).norm() / want.norm())
            self.add(self._row("error", case, left, value=error, what=f"against {right}"))

    def _row(self, section: str, case: Case, who: str, *, value: float, **more: str) -> Row:
        ours = SYNTHETIC if self.places.synthetic else FOLDER
        weights = ours if WAYS[who].packed else ""
        return Row(
            section=section, case=str(case), contestant=who, value=value, weights=weights, **more
        )

    def _failed(self, section: str, case: str, who: str, error: BaseException) -> None:
        traceback.print_exception(error)
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        self.add(Row(section=section, case=case, contestant=who, note=f"failed: {told}"))
        error.__traceback__ = None  # its frames hold tensors
        try:
            self.drop()
        except RuntimeError as worse:  # the GPU itself is lost to this process: `healthy` says so
            print(worse, flush=True)


def healthy() -> bool:
    """Return whether this process can still use the GPU: an illegal access ends that."""
    try:
        torch.ones(1, device="cuda").sum().item()
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
