"""`dirotq tune`: what is kept where, what a second run still does, and what it says."""

import json

import pytest
import torch

from dirotq import tune
from dirotq.kernels import measured
from dirotq.kernels.plan import choose, name_of, renew
from dirotq.tuning import compiling, session, shapes
from dirotq.tuning.fastest import Shape
from dirotq.tuning.random_linear import spec_for
from dirotq.tuning.timing import Timing

GPU = "NVIDIA GeForce RTX 4090"
SHAPES = [Shape(spec_for("w4a4", 3072, 9216), m) for m in (4608, 512, 16)]


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An RTX 4090 that is not there, on which the last candidate of every shape is fastest."""
    seen = []

    def by(shape, candidates, failed):
        seen.append(shape.m)
        return [(p, Timing(i, i, i)) for i, p in enumerate(reversed(candidates), start=1)]

    real = session.measure
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tune, "usable_gpu", lambda: (89, GPU))
    monkeypatch.setattr(measured, "gpu_of", lambda chip: GPU if chip == 89 else None)
    monkeypatch.setattr(compiling, "compile_all", lambda *_: None)
    monkeypatch.setattr(session, "measure", lambda *a, **k: real(*a, **{"by": by} | k))
    monkeypatch.setattr(shapes, "grid", lambda kinds: iter(SHAPES))
    renew()
    yield seen
    monkeypatch.undo()
    renew()


@pytest.fixture
def file(tmp_path):
    name = measured.tuned_name(89, GPU, measured.triton_version())
    return tmp_path / "cache" / "plans" / name


def test_the_fastest_are_kept_and_chosen_at_once(dirotq, gpu, file):
    before = choose(89, 4608, 9216, SHAPES[0].spec, torch.bfloat16)
    assert before.why == "no measurement for sm_89"
    result = dirotq("tune")
    assert (result.status, gpu) == (0, [4608, 512, 16])
    assert f"{GPU}, sm_89: 3 of 3 shapes to measure" in result.out
    assert f"3 shapes measured, in 0 s; kept in {file}" in result.out
    table = json.loads(file.read_text())
    assert table["chip"] == 89 and table["gpu"] == GPU and table["torch"] == torch.__version__
    assert table["triton"] == measured.triton_version()
    assert {row["m"] for row in table["plans"]["w4a4"]} == {4608, 512, 16}
    after = choose(89, 4608, 9216, SHAPES[0].spec, torch.bfloat16)
    assert after.why == "measured at 4608 x 3072 -> 9216 here"
    first = next(row for row in table["plans"]["w4a4"] if row["m"] == 4608)
    assert name_of(after) == first["plan"]


def test_a_second_run_measures_what_is_new_and_fresh_all(dirotq, gpu, file, monkeypatch):
    monkeypatch.setattr(shapes, "grid", lambda kinds: iter(SHAPES[:2]))
    dirotq("tune")
    monkeypatch.setattr(shapes, "grid", lambda kinds: iter(SHAPES))
    gpu.clear()
    assert "1 of 3 shapes to measure" in dirotq("tune").out
    assert gpu == [16]
    gpu.clear()
    assert "0 of 3 shapes to measure" in dirotq("tune").out
    assert gpu == []
    assert "3 of 3 shapes to measure" in dirotq("tune", "--fresh").out
    assert gpu == [4608, 512, 16]


def test_an_interrupted_run_goes_on(dirotq, gpu, file, monkeypatch):
    patched, real = session.measure, session.merged

    def interrupted(kinds, shape, rows):
        if shape.m == 16:
            raise KeyboardInterrupt
        return real(kinds, shape, rows)

    monkeypatch.setattr(session, "merged", interrupted)
    stopped = dirotq("tune")
    assert stopped.status == 2
    assert "run the same command to resume" in stopped.err
    assert {row["m"] for row in json.loads(file.read_text())["plans"]["w4a4"]} == {4608, 512}
    monkeypatch.setattr(session, "merged", real)
    gpu.clear()
    assert dirotq("tune").status == 0
    assert gpu == [16]
    assert patched is session.measure


def test_out_of_time_it_says_how_to_go_on(dirotq, gpu, monkeypatch):
    patched = session.measure
    monkeypatch.setattr(session, "measure", lambda *a, **k: patched(*a, **k | {"deadline": 0.0}))
    said = dirotq("tune", "--minutes", "0.5").out
    assert "0 shapes measured, 3 left" in said
    assert "out of time: the same command goes on" in said
    assert "the same command (without --fresh) goes on" in dirotq("tune", "--fresh").out


def test_minutes_are_shared_by_compiling_and_timing(dirotq, gpu, monkeypatch):
    asked = {}
    monkeypatch.setattr(tune.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(compiling, "compile_all", lambda *a: asked.update(compiling=a[2]))
    monkeypatch.setattr(
        session, "measure", lambda *_, deadline, **__: asked.update(timing=deadline) or _none()
    )
    dirotq("tune", "--minutes", "2")
    assert asked == {"compiling": 100 + 0.6 * 120, "timing": 220}


def _none():
    return session.Outcome()


def test_a_damaged_file_is_said_and_started_anew(dirotq, gpu, file):
    dirotq("tune")
    file.write_text("{")
    gpu.clear()
    result = dirotq("tune")
    assert f"{file} is damaged" in result.out
    assert gpu == [4608, 512, 16]
    assert measured.read_tuned(file, 89).shapes == 3


def test_a_cache_that_cannot_be_written_is_told_before_anything_is_measured(
    dirotq, gpu, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "file" / "below"))
    result = dirotq("tune")
    assert (result.status, gpu) == (2, [])
    assert "can't be written" in result.err and "DIROTQ_CACHE" in result.err


def test_a_packed_folder_gives_the_shapes(dirotq, gpu, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shapes, "shapes_of", lambda folder: asked.append(folder) or SHAPES[:1])
    assert "1 of 1 shapes" in dirotq("tune", str(tmp_path)).out
    assert asked == [tmp_path]


def test_a_folder_that_is_no_packed_model_is_refused(dirotq, gpu, tmp_path):
    result = dirotq("tune", str(tmp_path))
    assert result.status == 2
    assert "holds no packed pipeline" in result.err


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "soon"])
def test_minutes_are_a_number_above_zero(dirotq, minutes):
    result = dirotq("tune", f"--minutes={minutes}")
    assert result.status == 2
    assert "--minutes" in result.err


def test_without_a_gpu_nothing_is_written(dirotq, monkeypatch, tmp_path):
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = dirotq("tune")
    assert result.status == 2
    assert "measures on an NVIDIA GPU" in result.err and "`dirotq doctor`" in result.err
    assert not (tmp_path / "cache").exists()
