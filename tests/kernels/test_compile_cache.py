"""Compilers that can't write where they keep their work get a folder that they can."""

import os
from pathlib import Path

import pytest

from dirotq.kernels import chip, compile_cache


@pytest.fixture(autouse=True)
def anew(monkeypatch):
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "HUMMING_CACHE_DIR"):
        monkeypatch.setenv(name, "to be put back")
    for cached in (compile_cache.usable, compile_cache.triton, chip.say_once):
        cached.cache_clear()
    yield
    for cached in (compile_cache.usable, compile_cache.triton):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        ("TRITON_CACHE_DIR", compile_cache.triton),
        ("TORCHINDUCTOR_CACHE_DIR", compile_cache.inductor),
        ("HUMMING_CACHE_DIR", compile_cache.humming),
    ],
)
def test_a_place_that_can_be_written_stays(monkeypatch, tmp_path, caplog, variable, folder):
    pytest.importorskip("triton")
    monkeypatch.setenv(variable, str(tmp_path / "new" / "cache"))
    assert folder() == str(tmp_path / "new" / "cache")
    assert os.environ[variable] == str(tmp_path / "new" / "cache")
    assert not caplog.records


@pytest.mark.parametrize(
    ("variable", "folder"),
    [
        ("TRITON_CACHE_DIR", compile_cache.triton),
        ("TORCHINDUCTOR_CACHE_DIR", compile_cache.inductor),
        ("HUMMING_CACHE_DIR", compile_cache.humming),
    ],
)
def test_another_is_found_and_said_once(monkeypatch, tmp_path, caplog, variable, folder):
    pytest.importorskip("triton")
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
    other = folder()
    assert folder() == other == os.environ[variable]
    assert Path(other).is_dir()
    [record] = caplog.records
    assert str(tmp_path / "file" / "cache") in record.message
    assert f"set {variable} to a folder that can be written" in record.message
