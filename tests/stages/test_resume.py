"""Whatever is damaged in a folder that an interrupted run left: that unit is done again, no other,
and what is published is what an undisturbed run publishes.
"""

import dataclasses
import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_line import run_stage, stage, tree_bytes

from dirotq.calibrate.trajectory import Trajectories
from dirotq.errors import ArtifactError
from dirotq.evaluate import images as stored_images
from dirotq.evaluate.images import ImageWriter, read_images
from dirotq.pipeline.units import JOURNAL, Units
from dirotq.quantize import replayed_moments
from dirotq.quantize.tensors import load_site, save_site
from dirotq.stages import basis, gptq, low_rank

pytestmark = pytest.mark.usefixtures("looks_every_time")


@dataclasses.dataclass(frozen=True)
class Case:
    """A stage and how to stop it.

    owner, name  the function that makes one unit, called as often as units are made
    unit         the unit that a call of it makes, by its arguments
    units        those it finishes before it is stopped, and all of them
    """

    stage: Any
    owner: Any
    name: str
    unit: Callable[..., str]
    finished: tuple[str, ...]
    every: tuple[str, ...]
    inputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, out: Path, stop: bool = False) -> list[str]:
        """Run it to its end, or until it has finished what it should; the units that were made."""
        made: list[str] = []
        right = getattr(self.owner, self.name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            unit = self.unit(*args)
            if stop and unit not in self.finished:
                raise KeyboardInterrupt
            made.append(unit)
            return right(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.owner, self.name, counted)
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    run_stage(self.stage, out, **self.inputs)
            else:
                run_stage(self.stage, out, **self.inputs)
        return list(dict.fromkeys(made))


def published(out: Path) -> dict[str, bytes]:
    """What the store would publish and no clock decides."""
    skipped = (f"{JOURNAL}/", "report.", "pairs.")
    return {
        name: content
        for name, content in tree_bytes(out).items()
        if not name.startswith(skipped) and "_seconds/c/" not in name
    }


@pytest.fixture(scope="module")
def cases(line, finished):
    made: dict[str, Case] = {}
    names = [site.name for site in stage(line(), "capture").model.sites()]
    blocks = [n for n in names if "norm" not in n]
    quick = dataclasses.replace(stage(line("method=svdquant"), "basis"), candidates=1)
    saved = lambda folder, site, tensors: site  # noqa: E731
    for name, fitted, module, every in (
        ("basis", stage(line(), "basis"), basis, blocks),
        ("low_rank", quick, low_rank, blocks),
        ("gptq", stage(line(), "gptq"), gptq, names),
    ):
        slots = {"gptq": ("capture", "basis", "rank")}.get(name, ("capture",))
        given = {slot: finished[slot] for slot in slots}
        done, order = tuple(every[:6]), tuple(every)
        made[name] = Case(fitted, module, "save_site", saved, done, order, given)
    captured = dataclasses.replace(stage(line(), "capture"), batch=1)
    made["record"] = Case(
        captured, Trajectories, "record", lambda _, shard, choose: f"{shard[0].seed - 100:05d}",
        tuple(f"{i:05d}" for i in range(5)), tuple(f"{i:05d}" for i in range(6)),
    )  # fmt: skip
    of = {site.name: site.block or "" for site in captured.model.sites()}
    order = tuple(dict.fromkeys(sorted(of.values(), key=lambda b: (not b, "single" in b))))
    few = dataclasses.replace(captured, batch=2, calls=4)
    made["replay"] = Case(
        few, replayed_moments, "write_moment", lambda group, name, *_: of[name], order[:1], order
    )
    reference = dataclasses.replace(stage(line(), "reference"), batch=1, floor=False)
    seed = lambda pipe, prompts, call: str(prompts[0].seed)  # noqa: E731
    made["reference"] = Case(
        reference, stored_images, "generate_with_sound", seed, ("106",), ("106", "107")
    )
    validate = dataclasses.replace(stage(line(), "validate"), batch=1, pairs=0)
    slots = ("capture", "basis", "rank", "pack", "reference")
    made["validate"] = Case(
        validate, stored_images, "generate_with_sound", seed, ("106",), ("106", "107"),
        {slot: finished[slot] for slot in slots},
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def prepared(cases, tmp_path_factory):
    """``prepared(case)``: the folder of a run that was stopped, and what one publishes that isn't;
    made once."""
    found: dict[str, tuple[Path, dict[str, bytes]]] = {}

    def prepare(name: str) -> tuple[Path, dict[str, bytes]]:
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            assert cases[name].run(folder / "whole") == list(cases[name].every)
            assert cases[name].run(folder / "left", stop=True) == list(cases[name].finished)
            found[name] = folder / "left", published(folder / "whole")
        return found[name]

    return prepare


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


WAYS: tuple[Callable[[Path], Any], ...] = (
    flip,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    Path.unlink,
)


def entries(out: Path) -> dict[str, Path]:
    """{unit: its file in the journal}."""
    return {json.loads(p.read_text())["unit"]: p for p in (out / JOURNAL).iterdir()}


SITES = ("sites/{}.safetensors", "entry {}")
FILES = [
    *[(name, file) for name in ("basis", "low_rank", "gptq") for file in SITES],
    *[("record", file) for file in ("calls/{}.safetensors", "calls/{}.json", "entry calls {}")],
    *[
        ("replay", file)
        for file in (
            "moments.zarr/{}.*/c/**/*",
            "moments.zarr/{}.*/zarr.json",
            "rows.zarr/{}.*/c/**/*",
            "rows.zarr/{}.*/zarr.json",
            "peaks.zarr/{}.*/c/*",
            "peaks.zarr/{}.*/zarr.json",
            "entry replay {}",
        )
    ],
    *[
        ("reference", file)
        for file in (
            "images.zarr/original/c/0/**/*",
            "images.zarr/original/zarr.json",
            "images.zarr/original_seconds/c/0",
            "images.zarr/original_seconds/zarr.json",
            "entry original 0",
        )
    ],
    ("validate", "images.zarr/packed/c/0/**/*"),
]


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_damaged_unit_is_done_again_and_no_other(cases, prepared, tmp_path, name, file):
    """Flipped, empty, cut in half, gone: each way on a unit of its own, as far as there are any.

    Where there are fewer, another way for each kind of file: tests/pipeline/test_units.py has all.
    """
    case, (left, want) = cases[name], prepared(name)
    out = Path(shutil.copytree(left, tmp_path / "out"))
    journal, first = entries(out), FILES.index((name, file))
    damaged = case.finished[: len(WAYS)]
    for way, unit in enumerate(damaged, first):
        place = file.format(unit)
        if place.startswith("entry "):
            path = journal[place.removeprefix("entry ")]
        else:
            path = next(path for path in sorted(out.glob(place)) if path.is_file())
        WAYS[way % len(WAYS)](path)
    intact = set(case.finished) - set(damaged)
    assert case.run(out) == [unit for unit in case.every if unit not in intact]
    assert published(out) == want


@pytest.mark.parametrize("name", ["basis", "low_rank", "gptq", "record", "replay", "reference"])
def test_what_belongs_to_no_unit_costs_nothing_and_is_not_published(
    cases, prepared, tmp_path, name
):
    """The metadata of groups, half a write of another version or of a library, a link."""
    case, (left, want) = cases[name], prepared(name)
    out = Path(shutil.copytree(left, tmp_path / "out"))
    for group in out.glob("*.zarr/zarr.json"):
        group.write_bytes(b"")
    for stranger in ("X.partial", "sites/X.safetensors", "calls/9.tmp", "moments.zarr/x/c/0",
                     "images.zarr/.t.partial", "diagnosis/y", "replayed/000-x.json"):  # fmt: skip
        (out / stranger).parent.mkdir(parents=True, exist_ok=True)
        (out / stranger).write_text("{")
    (out / "link").symlink_to(tmp_path)
    assert case.run(out) == [unit for unit in case.every if unit not in case.finished]
    assert published(out) == want


@pytest.mark.parametrize("name", ["gptq", "record", "replay", "reference"])
def test_a_folder_that_an_older_version_left_is_begun_anew(cases, prepared, tmp_path, name):
    case, (left, want) = cases[name], prepared(name)
    out = Path(shutil.copytree(left, tmp_path / "out"))
    shutil.rmtree(out / JOURNAL)
    assert case.run(out) == list(case.every)
    assert published(out) == want


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), OSError(errno.EFBIG, "limit"), KeyboardInterrupt()]
)
def test_a_unit_that_was_half_written_is_done_again(cases, prepared, tmp_path, monkeypatch, error):
    """A full disk, a limit on the size of files, Ctrl-C: in the middle of a site."""
    case, (left, want) = cases["gptq"], prepared("gptq")
    out = Path(shutil.copytree(left, tmp_path / "out"))

    def half(tensors, path):
        path.write_bytes(b"half a file")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("dirotq.quantize.tensors.save_file", half)
        with pytest.raises(type(error)):
            run_stage(case.stage, out, **case.inputs)
    assert b"half a file" not in [p.read_bytes() for p in out.rglob("*") if p.is_file()]
    assert case.run(out) == [unit for unit in case.every if unit not in case.finished]
    assert published(out) == want


def test_stopped_when_all_units_are_finished_only_the_end_is_done(cases, prepared, tmp_path):
    """The roots of capture's trees are no unit's, and gone then."""
    case, (_, want), out = cases["replay"], prepared("replay"), tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(case.stage), "merge", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_stage(case.stage, out)
    assert case.run(out) == []
    assert published(out) == want


def test_passes_that_fall_otherwise_keep_what_a_single_one_finished(
    cases, prepared, tmp_path, monkeypatch
):
    case, (left, want) = cases["replay"], prepared("replay")
    monkeypatch.setattr(replayed_moments.Replay, "make_room", lambda *_: 1)
    out = Path(shutil.copytree(left, tmp_path / "out"))
    assert case.run(out) == [unit for unit in case.every if unit not in case.finished]
    got = published(out)
    assert set(got) == set(want)
    differ = {name.split("/")[1] for name in want if got[name] != want[name]}
    assert differ and not any(site.startswith(case.finished[0]) for site in differ)


def test_a_site_torn_while_the_stage_still_runs_is_named(cases, prepared, tmp_path, monkeypatch):
    case, (left, want) = cases["basis"], prepared("basis")
    out = Path(shutil.copytree(left, tmp_path / "out"))

    def torn(folder, site, tensors):
        file = save_site(folder, site, tensors)
        WAYS[2](folder / f"{case.finished[0]}.safetensors")
        return file

    with monkeypatch.context() as patch:
        patch.setattr(basis, "save_site", torn)
        with pytest.raises(ArtifactError, match=rf"{case.finished[0]}.*is damaged.*same command"):
            run_stage(case.stage, out, **case.inputs)
    assert case.run(out) == [case.finished[0]]
    assert published(out) == want


def test_images_of_another_device_stay_finished(tmp_path):
    def writer(device: str) -> ImageWriter:
        units = Units(tmp_path)
        return ImageWriter(tmp_path / "images.zarr", "x", 3, device=device, units=units)

    images = torch.rand(3, 3, 4, 4)
    writer("A").write(0, images[:2], 1.0)
    assert writer("B").missing(1) == [range(2, 3)]
    again = writer("B")
    assert again.missing(1) == [range(2, 3)]
    again.write(2, images[2:], 1.0)
    assert writer("A").missing(1) == []
    torch.testing.assert_close(
        read_images(tmp_path / "images.zarr", "x"), images, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("damage", WAYS)
def test_a_damaged_site_is_an_error_with_its_name(tmp_path, damage):
    save_site(tmp_path, "blocks.0", {"x": torch.rand(64)})
    damage(tmp_path / "blocks.0.safetensors")
    if damage is flip:  # its digest tells, not its form
        return
    with pytest.raises(ArtifactError, match=r"blocks\.0\.safetensors is damaged"):
        load_site(tmp_path / "blocks.0.safetensors")
