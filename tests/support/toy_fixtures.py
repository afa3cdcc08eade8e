"""The command line on the toy line (tests/support/toyline), in this process and in others."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from dirotq.cli import main
from dirotq.pipeline.store import ArtifactStore

ROOT = Path(__file__).resolve().parents[2]


class Result(NamedTuple):
    status: int
    out: str
    err: str


@contextmanager
def logging_put_back() -> Iterator[None]:
    """Restore the root logger, for which Hydra sets up handlers of its own."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def store(store_root: Path) -> ArtifactStore:
    return ArtifactStore(store_root)


@pytest.fixture
def dirotq(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """``dirotq("compress", "squares.power=3")`` on the toy tree, in this process."""

    def call(*args: str) -> Result:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main(args, config="toyline.conf")
        return Result(left.value.code, *capsys.readouterr())

    with logging_put_back():
        yield call


@pytest.fixture
def spawn() -> Callable[..., subprocess.Popen[str]]:
    """The same in a process of its own."""

    def start(*args: str) -> subprocess.Popen[str]:
        env = dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}")
        return subprocess.Popen(
            [sys.executable, "-m", "toyline", *args],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A shell that started the tests in the background made us ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start
