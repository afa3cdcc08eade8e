"""Many processes on one store at the same time: none is harmed, none waits for ever."""

import json

from race import race

from dirotq.pipeline.store import ArtifactStore


def test_runs_forces_verifies_and_collects_at_the_same_time(store_root):
    assert race(store_root, processes=4, rounds=20, limit=100) == []


def test_commands_that_force_the_same_stages(spawn, store_root):
    """Three commands recompute everything: one after the other, each with the right result."""
    racers = [spawn("compress", "force=[numbers,squares,total]") for _ in range(3)]
    for racer in racers:
        out, err = racer.communicate(timeout=100)
        assert racer.returncode == 0, err
        assert "report       " in out
    assert [artifact.stage for artifact in ArtifactStore(store_root).list()] == [
        "numbers", "squares", "total",
    ]  # fmt: skip


def test_two_collect_at_the_same_time(spawn, store_root):
    store = ArtifactStore(store_root)
    for number in range(60):
        with store.create("toy", {"stage": number, "inputs": {}}) as draft:
            (draft.data / "x").write_text(json.dumps(number))
    racers = [spawn("gc", "--keep=0", "--yes") for _ in range(2)]
    for racer in racers:
        _, err = racer.communicate(timeout=100)
        assert racer.returncode == 0, err
        assert err == ""
    assert store.everything() == []
