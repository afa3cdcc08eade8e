"""`make bench-compress`: figures that survive a kill, and one process beside several."""

from types import SimpleNamespace

import pytest

from dirotq.benchmarks.compress import TINY, chosen
from dirotq.benchmarks.compress_table import Figures, beside, digest, row
from dirotq.pipeline.config import compose_config

ORDER = ["capture", "basis", "gptq", "pack"]


def artifact(stage, seconds=4.0, content="a", workers=()):
    past = {"seconds": seconds, "peak_rss_bytes": 2 * 10**9, "workers": list(workers)}
    files = {"data/x": {"sha256": content, "bytes": 5}}
    return SimpleNamespace(
        stage=stage, fingerprint="f", bytes=5 * 10**9, provenance=past, manifest={"files": files}
    )


@pytest.fixture
def figures(tmp_path):
    return lambda name="one": Figures(
        tmp_path / f"{name}.json",
        {"order": ORDER, "what": "flux", "way": name, "machine": "H200"},
    )


def run(figures, seconds, content="a"):
    for stage in ORDER:
        figures.begin(stage, "f")
        worker = {"peak_rss_bytes": 10**9, "peak_vram_bytes": 3 * 10**9}
        figures.end(artifact(stage, content=content, workers=[worker]), seconds)
    return {"about": figures.about, "stages": figures.stages}


def test_a_generated_model_has_the_defaults_of_the_published_one():
    cfg = compose_config(chosen("wan22", "/models/it's wan"), "dirotq.conf")
    assert cfg.model.path == "/models/it's wan"
    assert (cfg.model.sample.num_frames, cfg.prompts.calibration.count) == (25, 4)
    assert cfg.model.call.num_inference_steps == 40
    assert compose_config(chosen("flux2_dev", "/x"), "dirotq.conf").model.path == "/x"
    assert chosen(TINY, TINY) == [f"model={TINY}"]


def test_what_a_stage_took_is_known_to_the_next_run(figures):
    first = figures()
    first.begin("basis", "f")
    assert first.end(artifact("basis"), 5.0)["seconds"] == 5.0
    again = figures()
    again.begin("basis", "f")
    found = again.end(artifact("basis"), 0.01)  # from the store
    assert (found["seconds"], found["resumed"]) == (5.0, False)
    assert figures("other").end(artifact("basis"), 0.01)["seconds"] == 4.0  # as its maker told


def test_a_stage_that_was_stopped_is_marked(figures):
    figures().begin("basis", "f")
    again = figures()
    again.begin("basis", "f")
    assert row("basis", again.end(artifact("basis"), 5.0)).startswith("| basis (resumed) | 5 |")
    changed = figures("two")
    changed.begin("basis", "of another recipe")
    changed.begin("basis", "f")
    assert not changed.end(artifact("basis"), 5.0)["resumed"]


def test_two_runs_side_by_side(figures):
    one, several = run(figures(), 6.0), run(figures("several"), 4.0)
    lines = beside(one, several).splitlines()
    assert lines[2] == (
        "| stage | one, s | several, s | gain | bytes | VRAM of each process, GB "
        "| RAM of each, GB | RAM of all, GB |"
    )
    assert lines[4] == "| capture | 6 | 4 | 1.50x | same | 0 + 3 | 2 + 1 | 3 |"
    assert lines[8:] == [
        "| capture, basis, gptq | 18 | 12 | 1.50x | | | | |",
        "| all | 24 | 16 | 1.50x | | | | |",
    ]


def test_bytes_that_differ_are_told_and_unfinished_stages_are_left_out(figures):
    one, several = run(figures(), 6.0), run(figures("several"), 4.0, content="b")
    del several["stages"]["gptq"]["seconds"]
    lines = beside(one, several).splitlines()
    assert "DIFFERENT" in lines[4]
    assert not any("gptq" in line for line in lines[4:])
    assert digest(artifact("basis")) != digest(artifact("basis", content="b"))
