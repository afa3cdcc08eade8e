"""No garbage is looked for while much is imported, and then never among that."""

import gc

import pytest

from dirotq.pipeline import build, compress, worker
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.importing import imported, no_collecting


@pytest.mark.parametrize("before", [True, False])
def test_collecting_goes_on_as_before(before):
    try:
        if not before:
            gc.disable()
        with no_collecting():
            with no_collecting():
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert gc.isenabled() == before
        with pytest.raises(ValueError), no_collecting():
            raise ValueError
        assert gc.isenabled() == before
    finally:
        gc.enable()


@pytest.mark.parametrize(("frozen", "times"), [(0, 1), (1, 0)])
def test_what_is_there_is_left_out_once(monkeypatch, frozen, times):
    left = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: frozen)
    monkeypatch.setattr(gc, "freeze", lambda: left.append(1))
    imported()
    assert len(left) == times


@pytest.fixture
def frozen(monkeypatch):
    """``frozen``: whether garbage was looked for, each time that something was left out of it."""
    found = []
    monkeypatch.setattr(gc, "get_freeze_count", lambda: 0)
    monkeypatch.setattr(gc, "freeze", lambda: found.append(gc.isenabled()))
    return found


@pytest.mark.parametrize("verb", ["compress", "plan"])
def test_commands_leave_out_what_they_import(dirotq, frozen, verb):
    assert dirotq(verb).status == 0
    assert frozen == [False]
    assert gc.isenabled()


def test_python_that_is_somebody_elses_is_left_as_it_is(monkeypatch, frozen, store_root):
    collecting = []
    monkeypatch.setattr(
        build, "refuse_secret_settings", lambda _: collecting.append(gc.isenabled())
    )
    build.build(compose_config([], "toyline.conf"))
    assert collecting == [False]
    monkeypatch.setattr(compress, "CONFIG", "toyline.conf")
    compress.run([])
    assert frozen == []


def test_workers_leave_out_what_they_import(monkeypatch, frozen):
    collecting = []
    monkeypatch.setattr(
        worker.importlib, "import_module", lambda _: collecting.append(gc.isenabled())
    )
    worker._prepare(gpu=False)
    assert collecting == [False] * len(worker.IMPORTED)
    assert frozen == [False]
    assert gc.isenabled()
