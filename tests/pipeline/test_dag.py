import json
import multiprocessing
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
from toyline.stages import Numbers, Squares, Total, ToyModel

from dirotq.errors import ArtifactError, ConfigError
from dirotq.files.digest import input_digests
from dirotq.pipeline import dag
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.locks import InUseError
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.store import ArtifactStore

WIRING = {
    "total": {"numbers": "numbers", "squares": "squares"},
    "squares": {"numbers": "numbers"},
    "numbers": {},
}


def steps(*, power=2, offset=0, trouble=None, fail=False, wiring=WIRING):
    model = ToyModel(path="anywhere", offset=offset)
    stages = {
        "numbers": Numbers(model=model, count=4, trouble=trouble, ledger=None, pause=0),
        "squares": Squares(power=power, fail=fail),
        "total": Total(),
    }
    return dag.plan(stages, wiring)


def run(store, *args, force=(), **kwargs):
    outcomes = dag.run(steps(*args, **kwargs), store, LocalExecutor(), force=force)
    ran = [name for name, outcome in outcomes.items() if outcome.seconds is not None]
    return ran, {name: outcome.artifact for name, outcome in outcomes.items()}


def fingerprints(**kwargs):
    return {step.name: step.fingerprint for step in steps(**kwargs)}


def test_order_follows_the_wires():
    assert [step.name for step in steps()] == ["numbers", "squares", "total"]


def test_a_changed_field_changes_what_is_downstream():
    one, other = fingerprints(), fingerprints(power=3)
    assert one["numbers"] == other["numbers"]
    assert one["squares"] != other["squares"]
    assert one["total"] != other["total"]


def test_identity_of_an_outside_input_reaches_everything():
    one, other = fingerprints(), fingerprints(offset=1)
    assert not set(one.values()) & set(other.values())


def test_second_run_is_cached_and_equal(store):
    ran, first = run(store)
    assert ran == ["numbers", "squares", "total"]
    ran, second = run(store)
    assert ran == []
    assert first == second
    assert first["total"].metrics == {"total": 14, "per_number": 3.5}


def test_only_what_depends_on_a_change_runs_again(store):
    run(store)
    assert run(store, power=3)[0] == ["squares", "total"]
    assert run(store)[0] == []


def test_force_runs_one_stage_again(store):
    run(store)
    assert run(store, force=["squares"])[0] == ["squares"]


def test_crash_publishes_nothing_and_the_next_run_is_clean(store):
    with pytest.raises(RuntimeError, match="boom"):
        run(store, fail=True)
    assert [artifact.stage for artifact in store.list()] == ["numbers"]
    ran, artifacts = run(store)
    assert ran == ["squares", "total"]
    assert list(artifacts["squares"].manifest["files"]) == ["squares.json"]


def test_interrupt_names_the_stage_and_the_next_run_resumes(store):
    with pytest.raises(KeyboardInterrupt) as caught:
        run(store, trouble="interrupt")
    assert caught.value.args == ("numbers",)
    partial = next((store.root / "numbers").glob("*.partial"))
    assert {p.name for p in (partial / "data" / "parts").iterdir()} == {"0.json", "1.json"}
    resumed = run(store)[1]
    assert resumed["total"].metrics["total"] == 14


def test_until_takes_only_what_is_needed():
    assert dag.order(WIRING, "squares") == ["numbers", "squares"]
    assert dag.order(WIRING, None) == ["numbers", "squares", "total"]
    with pytest.raises(ConfigError, match="'nix' is no stage of this pipeline"):
        dag.order(WIRING, "nix")


@pytest.mark.parametrize(
    ("wiring", "says"),
    [
        (WIRING | {"squares": {"acts": "numbers"}}, r"takes the inputs \['numbers'\].*\['acts'\]"),
        (WIRING | {"numbers": {"x": "total"}}, "has a cycle: "),
        (WIRING | {"squares": {"numbers": "primes"}}, "'primes' is no stage"),
    ],
)
def test_wrong_wiring(wiring, says):
    with pytest.raises(ConfigError, match=says):
        steps(wiring=wiring)


@pytest.mark.parametrize(
    ("wiring", "says"),
    [
        ({"numbers": "numbers"}, None),
        ({"numbers": "numbers", "more": "numbers"}, None),
        ({"more": "numbers"}, r"takes the inputs \['more', 'numbers'\].*\['more'\]"),
    ],
)
def test_a_slot_with_a_default_may_stay_unwired(wiring, says):
    @dataclass(frozen=True)
    class Sum:
        version: ClassVar[str] = "1"

        def run(self, out: Path, *, numbers: object, more: object = None) -> dict[str, float]:
            return {}

    model = ToyModel(path="anywhere", offset=0)
    numbers = Numbers(model=model, count=4, trouble=None, ledger=None, pause=0)
    stages, wires = {"numbers": numbers, "sum": Sum()}, {"numbers": {}, "sum": wiring}
    if says is None:
        assert dag.plan(stages, wires)[-1].recipe["inputs"].keys() == wiring.keys()
    else:
        with pytest.raises(ConfigError, match=says):
            dag.plan(stages, wires)


def test_something_else_than_a_stage():
    with pytest.raises(ConfigError, match="a ToyModel is no stage"):
        dag.plan({"toy": ToyModel(path="", offset=0)}, {"toy": {}})


def test_a_field_without_identity():
    @dataclass(frozen=True)
    class Odd:
        version: ClassVar[str] = "1"
        what: object = object()

        def run(self, out: Path) -> dict[str, float]:
            return {}

    with pytest.raises(ConfigError, match="cannot fingerprint a object"):
        dag.plan({"odd": Odd()}, {"odd": {}})


@dataclass(frozen=True)
class FileModel:
    """A model on disk, known by its bytes."""

    path: str

    def identity(self) -> dict[str, str]:
        return {"weights": input_digests([Path(self.path)])[Path(self.path)]}


@dataclass(frozen=True)
class Reading:
    """Writes two files, one after the other, and lets something happen between them."""

    version: ClassVar[str] = "1"
    resumable: ClassVar[bool] = True
    model: FileModel
    meanwhile: Callable[[], None] = untracked()  # noqa: RUF009 (a field without a default)

    def run(self, out: Path, **inputs) -> Mapping[str, float]:
        weights = Path(self.model.path)
        for number, name in enumerate(("a", "b")):
            if number == 1:
                self.meanwhile()
            if not (out / name).exists():
                (out / name).write_text(weights.read_text() if weights.exists() else "zeros")
        return {}


@dataclass(frozen=True)
class ReadingInput(Reading):
    """The same of an artifact's files, which it reads lazily, as Zarr does: a missing one is 0."""

    def run(self, out: Path, *, first) -> Mapping[str, float]:
        tree = first.tree("parts")
        for number in range(4):
            if number == 2:
                self.meanwhile()
            part = tree / f"{number}.json"
            (out / f"{number}").write_text(part.read_text() if part.exists() else "0")
        return {}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("right")
    return path


def reading_line(weights, meanwhile=lambda: None):
    return dag.plan({"reading": Reading(FileModel(str(weights)), meanwhile)}, {"reading": {}})


def go(line, store, **options):
    return dag.run(line, store, LocalExecutor(), **options)


def test_weights_that_change_while_a_stage_reads_them(store, weights):
    line = reading_line(weights, lambda: weights.write_text("WRONG"))
    with pytest.raises(ArtifactError, match=r"changed while it ran: recipe\.model\.weights") as e:
        go(line, store)
    assert "Nothing was published" in str(e.value)
    assert list(store.root.glob("reading/*")) == []  # what is half right is no start for a resume
    weights.write_text("right")
    artifact = go(reading_line(weights), store)["reading"].artifact
    assert [artifact.file(name).read_text() for name in "ab"] == ["right", "right"]


def test_weights_that_changed_before_a_stage_began(store, weights):
    line = reading_line(weights)
    weights.write_text("WRONG")
    with pytest.raises(ArtifactError, match="was not run: what it reads changed since"):
        go(line, store)
    assert store.list() == []
    weights.unlink()
    with pytest.raises(ArtifactError, match="No such file"):
        go(line, store)


def test_an_interrupted_stage_of_changed_weights_leaves_nothing_to_resume(store, weights, caplog):
    def trouble():
        weights.write_text("WRONG")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(reading_line(weights, trouble), store)
    assert "its work is dropped" in caplog.text
    assert list(store.root.glob("reading/*")) == []


def test_touched_but_equal_weights_are_no_change(store, weights):
    def touch():
        weights.rename(weights.with_suffix(".old"))
        weights.write_text("right")

    go(reading_line(weights, touch), store)
    assert len(store.list()) == 1


def input_line(weights, meanwhile=lambda: None):
    numbers = Numbers(
        model=ToyModel(path="", offset=1), count=4, trouble=None, ledger=None, pause=0
    )
    stages = {"numbers": numbers, "reading": ReadingInput(FileModel(str(weights)), meanwhile)}
    return dag.plan(stages, {"numbers": {}, "reading": {"first": "numbers"}})


@pytest.mark.parametrize("how", [Path.unlink, lambda path: path.write_text("7")])
def test_a_file_that_vanishes_or_changes_while_it_is_read_lazily(store, weights, how):
    def harm():
        how(next(store.root.glob("numbers/*/data/parts/3.json")))

    with pytest.raises(ArtifactError, match=r"changed while it ran: .*parts/3\.json (is|changed)"):
        go(input_line(weights, harm), store)
    assert [artifact.stage for artifact in store.list()] == ["numbers"]
    assert list(store.root.glob("reading/*")) == []


def test_what_a_run_reads_stays_until_it_ends(store, weights):
    """No other process may remove or replace it; afterwards it may."""
    tried = []

    def harm():
        for artifact in ArtifactStore(store.root).list():
            with pytest.raises(InUseError):
                ArtifactStore(store.root).remove(artifact.path)
            tried.append(artifact.stage)

    go(input_line(weights, harm), store)
    assert tried == ["numbers"]
    for artifact in store.list():
        store.remove(artifact.path)


def test_what_vanishes_between_publication_and_reading_is_made_again(store, weights, monkeypatch):
    """As by the gc of another process, in the moment when nobody holds it."""
    reading, taken = ArtifactStore.reading, []

    def late(self, stage, key):
        if stage == "numbers" and self.get(stage, key) and not taken:
            taken.append(key)
            self.remove(self.root / stage / key)
        return reading(self, stage, key)

    monkeypatch.setattr(ArtifactStore, "reading", late)
    done = go(input_line(weights), store)
    assert taken
    assert done["reading"].artifact.file("3").read_text() == "4"


def test_a_damaged_manifest_shows_before_anything_runs(store, weights):
    first = go(input_line(weights), store)["numbers"].artifact
    (first.path / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match=f"artifact {first} is damaged"):
        go(input_line(weights), store, force=["reading"])


@dataclass(frozen=True)
class Elsewhere(ReadingInput):
    """Spoils the model in the process that runs it."""

    meanwhile: None = untracked(default=None)
    harm: str = field(default="", metadata={"tracked": False})

    def run(self, out: Path, *, first) -> Mapping[str, float]:
        first.tree("parts")
        (out / "one").write_text(json.dumps(first.metrics))
        if self.harm:
            Path(self.harm).write_text("WRONG")
        return {}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_lock_and_look_again_too(store, weights, method):
    numbers = Numbers(
        model=ToyModel(path="", offset=1), count=4, trouble=None, ledger=None, pause=0
    )

    def line(harm):
        stages = {"numbers": numbers, "else": Elsewhere(FileModel(str(weights)), harm=harm)}
        return dag.plan(stages, {"numbers": {}, "else": {"first": "numbers"}})

    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        with pytest.raises(ArtifactError, match="changed while it ran"):
            pool.submit(go, line(str(weights)), store).result()
        weights.write_text("right")
        done = pool.submit(go, line(""), store).result()
        assert done["numbers"].seconds is None
        assert done["else"].artifact.file("one")
    shutil.rmtree(store.root)
