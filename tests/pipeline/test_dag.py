from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from toyline.stages import Numbers, Squares, Total, ToyModel

from dirotq.errors import ConfigError
from dirotq.pipeline import dag
from dirotq.pipeline.executor import LocalExecutor

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
