"""Fixtures of the tests that need the tiny pipeline. A conftest imports the ones it wants.

Everything is built once per process and never written to; copy what a test means to damage.
"""

import shutil
from pathlib import Path

import pytest

__all__ = ["finished", "folder", "line", "own_folder", "packed_folder", "tiny_root"]


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.getbasetemp() / "tiny"
    root.mkdir(exist_ok=True)
    return root


@pytest.fixture(scope="session")
def folder(tiny_root: Path) -> Path:
    """The 16-bit pipeline."""
    from tiny_line import model_folder

    return model_folder(tiny_root)


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy of the 16-bit pipeline that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy of the model"))


@pytest.fixture(scope="session")
def line(tiny_root: Path):
    """Configured lines on the tiny pipeline that share one store: ``line("method=rtn")``."""
    import functools

    from tiny_line import configured

    return functools.partial(configured, tiny_root, tiny_root / "store")


@pytest.fixture(scope="session")
def finished(line):
    """The default line's artifacts, {stage: artifact}."""
    from tiny_line import run

    return run(line())


@pytest.fixture
def packed_folder(finished, tmp_path: Path) -> Path:
    """A copy of the packed model that a test may damage."""
    return Path(shutil.copytree(finished["pack"].tree("model"), tmp_path / "packed"))
