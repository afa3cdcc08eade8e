import dataclasses
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from dirotq.pipeline import dag
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.history import last_run_here, took

SECONDS = 20.0
WHOLE = {
    "host": platform.node(),
    "seconds": SECONDS,
    "peak_rss_bytes": 5,
    "resumed": False,
    "estimate": {"machine": "CPU"},
}


@dataclass(frozen=True)
class Writing:
    """Writes two files; told to, it is killed between them."""

    version: ClassVar[str] = "1"
    resumable: ClassVar[bool] = True
    number: int
    model: str = "flux"

    def run(self, out: Path) -> dict[str, float]:
        (out / "first").write_text("1")
        if (out.parents[3] / "kill").exists():
            raise KeyboardInterrupt
        (out / "second").write_text("2")
        return {}


def planned(number, **changes):
    return dag.plan({"writing": Writing(number, **changes)}, {"writing": {}})


def made(store, number, provenance=None, **changes):
    """An artifact of the stage, with this provenance."""
    dag.run(planned(number, **changes), store, LocalExecutor())
    artifact = store.get("writing", planned(number, **changes)[0].fingerprint)
    if provenance is not None:
        (artifact.path / "provenance.json").write_text(json.dumps(provenance))
    return artifact


def seconds(store, machine="CPU"):
    [step] = planned(9)
    found = last_run_here(step, store.list(), machine)
    return found and found.seconds


def test_the_last_whole_run_here_counts(store):
    assert seconds(store) is None
    made(store, 1, WHOLE | {"seconds": 3.0})
    made(store, 2, WHOLE)
    assert seconds(store) == SECONDS


@pytest.mark.parametrize(
    "other",
    [
        {"resumed": True},
        {"resumed": None},
        {"host": "elsewhere"},
        {"estimate": {"machine": "NVIDIA H200"}},
        {"estimate": {}},
        {"estimate": "x"},
        {"seconds": "20"},
        {"seconds": -20.0},
        {"seconds": None},
        {"peak_rss_bytes": None},
        {"peak_vram_bytes": -1},
    ],
)
def test_a_run_that_was_not_whole_here_or_sane_does_not_count(store, other):
    made(store, 1, WHOLE | other)
    assert seconds(store) is None
    made(store, 2, WHOLE)
    made(store, 3, WHOLE | other | {"seconds": other.get("seconds", 1.0)})
    assert seconds(store) == SECONDS


@pytest.mark.parametrize("nonsense", [{}, []])
def test_nonsense_does_not_count(store, nonsense):
    made(store, 1, nonsense)
    assert seconds(store) is None


def test_runs_of_another_model_or_stage_do_not_count(store):
    made(store, 1, WHOLE, model="sana")
    assert seconds(store) is None
    [step] = dag.plan({"other": Writing(9)}, {"other": {}})
    made(store, 2, WHOLE)
    assert last_run_here(step, store.list(), "CPU") is None


def test_without_a_machine_any_of_this_host_counts(store):
    made(store, 1, WHOLE)
    assert seconds(store, machine=None) == SECONDS


def test_a_run_that_resumed_says_so_and_does_not_count(store):
    """Whatever was expected of it: what it found on the disk decides."""
    kill = store.root.parent / "kill"
    kill.parent.mkdir(parents=True, exist_ok=True)
    kill.touch()
    with pytest.raises(KeyboardInterrupt):
        made(store, 1)
    kill.unlink()
    assert made(store, 1).provenance["resumed"] is True
    assert seconds(store, machine=None) is None
    assert made(store, 2).provenance["resumed"] is False
    assert seconds(store, machine=None) is not None


def test_what_a_run_took(store):
    artifact = made(store, 1, WHOLE | {"peak_vram_bytes": 7})
    assert dataclasses.astuple(took(artifact)) == (SECONDS, 7, 5, 2, (), 0.0, 1)
