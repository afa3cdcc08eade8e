"""Every kind of error as people meet it: one paragraph, a status, what to do."""

import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import dirotq as front_door
from dirotq.errors import ConfigError
from dirotq.pipeline import compress, disk
from dirotq.pipeline.faults import explained


class OutOfMemoryError(RuntimeError):
    """As torch calls its own."""


def in_stage(error):
    error.add_note("in stage gptq")
    return error


def with_cause(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "says", "status"),
    [
        (ConfigError("rank.r=3: use 4"), r"^rank\.r=3: use 4$", 2),
        (in_stage(RuntimeError("boom")), r"fault of DiRotQ .*Error: boom \(in stage gptq", 1),
        (KeyError("x"), r"KeyError: 'x'.*report it.*--debug.*dirotq doctor", 1),
        (AssertionError(), r"AssertionError: no word of explanation", 1),
        (KeyboardInterrupt("gptq"), r"^interrupted in gptq; .*same command to resume", 2),
        (MemoryError(), r"memory \(RAM\) of this machine is full.*smaller capture\.batch", 2),
        (OutOfMemoryError("CUDA out of memory. Tried"), r"GPU's memory is full.*capture\.vram", 2),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), r"memory \(RAM\)", 2),
        (RuntimeError("CUDA error: out of memory"), r"GPU's memory is full", 2),
        (RuntimeError("CUDA error: unknown error"), r"GPU or its driver failed.*device=cpu", 2),
        (OSError(errno.ENOSPC, "No space left on device"), r"disk is full.*dirotq gc", 2),
        (OSError(errno.ENOSPC, "No space left", "/dev/shm/torch_1"), r"/dev/shm is full", 2),
        (RuntimeError("unable to write to file </t> in /dev/shm"), r"/dev/shm is full.*docker", 2),
        (with_cause(ValueError("x"), OSError(errno.EDQUOT, "quota")), r"disk is full", 2),
        (OSError(errno.EFBIG, "File too large"), r"file size limit of this shell.*ulimit -f", 2),
        (ValueError("I/O error: File too large (os error 27)"), r"ulimit -f unlimited", 2),
        (OSError(errno.EMFILE, "Too many open files"), r"ulimit -n", 2),
        (OSError(errno.EROFS, "Read-only file system", "/x"), r"can only be read", 2),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), r"reading the output has ended", 2),
        (OSError(errno.ENAMETOOLONG, "x", "/a/b"), r"^/a/b: the name is too long", 2),
        (NotADirectoryError(errno.ENOTDIR, "x", "/a/b"), r"^/a/b: a part of the path is a file", 2),
        (FileNotFoundError(errno.ENOENT, "x", "/a/b"), r"^/a/b: there is no such file", 2),
        (OSError(errno.EIO, "Input/output error", "/a/b"), r"disk failed to read or write", 2),
        (RuntimeError("Could not determine home directory."), r"HOME is not set", 2),
    ],
)  # fmt: skip
def test_every_kind_has_its_words(error, says, status):
    text, found = explained(error)
    assert re.search(says, text), text
    assert found == status
    assert "\n" not in text


def test_permission_says_whose_it_is_and_who_asks(tmp_path):
    file = tmp_path / "private"
    file.touch(mode=0o600)
    text, status = explained(PermissionError(errno.EACCES, "Permission denied", str(file)))
    me = disk.user_name(os.geteuid())
    assert status == 2
    assert f"permission denied for {file} (it belongs to {me}, mode -rw-------)" in text
    assert f"runs as {me}" in text
    assert "store=FOLDER" in text
    below, _ = explained(PermissionError(errno.EACCES, "x", str(tmp_path / "new" / "deeper")))
    assert f"({tmp_path} belongs to {me}, mode drwx" in below


@pytest.fixture
def toy(tmp_path):
    """``toy("plan", preexec=...)``: the toy line in a process and a folder of its own."""
    root = Path(__file__).resolve().parents[2]

    def call(*args, preexec=None, env=(), cwd=tmp_path, **options):
        path = f"{root}{os.pathsep}{root / 'tests' / 'support'}"
        return subprocess.run(
            [sys.executable, "-m", "toyline", *args],
            env={**os.environ, "PYTHONPATH": path, **dict(env)},
            cwd=cwd, text=True, capture_output=True, check=False, preexec_fn=preexec, **options,
        )  # fmt: skip

    return call


def test_the_file_size_limit_of_the_shell(toy):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))  # noqa: E731
    # Bytecode that Python writes under the limit is cut, and stays so for whoever reads it next.
    done = toy("compress", preexec=limit, env={"PYTHONDONTWRITEBYTECODE": "1"})
    assert done.returncode == 2
    assert "ulimit -f" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_folder_it_was_started_in_is_gone(toy, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    done = toy("plan", cwd=gone, preexec=gone.rmdir)
    assert done.returncode == 2
    assert "the folder that this was started in does not exist any more" in done.stderr


def test_a_terminal_that_lacks_letters_is_no_error(toy, tmp_path):
    done = toy("compress", f"store={tmp_path / 'é'}", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert r"\xe9" in done.stdout


def test_a_full_device_as_output(toy):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        root = Path(__file__).resolve().parents[2]
        path = f"{root}{os.pathsep}{root / 'tests' / 'support'}"
        done = subprocess.run(
            [sys.executable, "-m", "toyline", "plan"], env={**os.environ, "PYTHONPATH": path},
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["compress", "plan", "explain", "verify", "gc", "generate"])
@pytest.mark.parametrize("store", ["", " ", "{tmp}/file", "{tmp}/file/below", "{tmp}/loose"])
def test_a_store_that_can_be_no_folder(dirotq, tmp_path, monkeypatch, verb, store):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loose").symlink_to("/nowhere/at/all")
    place = store.format(tmp=tmp_path)
    more = ["x", "--prompt", "x"] if verb == "generate" else []
    says = "cannot be written" if place.strip() else "the store has no name"
    for way in ("override", "variable", "option"):
        if way == "option" and verb in ("compress", "plan", "explain"):
            continue
        args = {"override": [f"store={place}"], "option": ["--store", place], "variable": []}[way]
        monkeypatch.setenv("DIROTQ_STORE", place if way == "variable" else str(tmp_path / "s"))
        result = dirotq(verb, *more, *args)
        assert (result.status, says in result.err) == (2, True), (way, result)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loose"]


def test_an_artifacts_file_in_the_current_folder(dirotq, tmp_path, monkeypatch):
    monkeypatch.delenv("DIROTQ_STORE")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").write_text("x")
    result = dirotq("compress")
    assert result.status == 2
    assert f"{tmp_path / 'artifacts'} is no folder" in result.err


def test_python_gets_errors_of_the_project(monkeypatch, store):
    monkeypatch.setattr(compress, "CONFIG", "toyline.conf")
    for override in ("squares.powr=3", "squares=nix", "squares.power=[1", "-m", "squares.power=x"):
        with pytest.raises(ConfigError):
            front_door.compress(override)
    with pytest.raises(ConfigError, match="key or a password"):
        front_door.compress("+squares.api_key=hunter2")
    assert not store.root.exists()


def test_debug_stands_anywhere_and_version_too(dirotq):
    for args in (
        ["--debug", "plan", "x=1"],
        ["plan", "--debug", "x=1"],
        ["plan", "x=1", "--debug"],
    ):
        assert "Traceback" in dirotq(*args).err
    for args in (["--version"], ["plan", "--version"], ["compress", "--version"]):
        result = dirotq(*args)
        assert (result.status, result.out) == (0, f"dirotq {front_door.__version__}\n")


def test_options_where_there_are_none(dirotq):
    assert "-m is an option of `dirotq compress` alone" in dirotq("plan", "-m").err
    assert "--config-name" in dirotq("compress", "--config-name=x").err
    assert dirotq("compress", "squares.power=3", "-m", "until=squares").status == 0
