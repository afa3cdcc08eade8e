import os
import time

import pytest
from filelock import FileLock

from dirotq.pipeline import cache
from dirotq.pipeline.locks import InUseError

DAY = 24 * 60 * 60


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    sources = tmp_path / "cache" / "sources"
    for number, days in enumerate((0, 3, 8)):
        model = sources / f"{number:032x}"
        (model / "transformer").mkdir(parents=True)
        (model / "transformer" / "weights").write_bytes(bytes(1000))
        used = time.time() - days * DAY - 60
        os.utime(model, (used, used))
        (sources / f"{model.name}.lock").touch()
    draft = sources / f".{9:032x}-abc"
    draft.mkdir()
    (sources / "somebody else's").mkdir()
    return sources


def names(days):
    return [path.name[-3:] for path, _ in cache.unused(days)]


def test_age_decides(sources):
    assert sorted(names(0)) == ["000", "001", "002", "abc"]
    assert names(0)[0] == "002"  # the longest unused first
    assert set(names(3)) == {"001", "002", "abc"}
    assert set(names(4)) == {"002", "abc"}
    assert names(9) == ["abc"]
    assert "last used 8 days ago" in dict(cache.unused(7))[sources / f"{2:032x}"]


def test_what_is_being_made_stays(sources):
    model, draft = sources / f"{2:032x}", sources / f".{9:032x}-abc"
    with FileLock(f"{model}.lock"), pytest.raises(InUseError):
        cache.remove(model)
    with FileLock(sources / f"{9:032x}.lock"):
        assert names(9) == []
        with pytest.raises(InUseError):
            cache.remove(draft)
    for path in (model, draft, draft):
        cache.remove(path)
    assert not model.exists()


def test_runs_on_stores_that_can_only_be_read(sources):
    run = sources.parent / "runs" / "2026-01-02_03-04-05_000006"
    run.mkdir(parents=True)
    (run / "dirotq.log").write_text("done")
    assert run not in dict(cache.unused(1))
    os.utime(run, (0, 0))
    assert "a run on a store" in dict(cache.unused(1))[run]
    cache.remove(run)
    assert not run.exists()


def test_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "nowhere"))
    assert list(cache.unused(0)) == []


def test_gc_collects_it_only_when_told(dirotq, sources):
    assert "nothing to remove" in dirotq("gc", "--yes").out
    listed = dirotq("gc", "--cache").out
    assert (
        f"1.0 kB  {sources / f'{2:032x}'}  (a model in the cache, last used 8 days ago)" in listed
    )
    assert "would remove 1.0 kB" in listed
    assert "removed 1.0 kB" in dirotq("gc", "--cache", "--yes").out
    assert "removed 2.0 kB" in dirotq("gc", "--cache=0", "--yes").out
    assert [path.name for path in sources.iterdir() if path.is_dir()] == ["somebody else's"]
    assert dirotq("gc", "--cache=-1").status == 2
