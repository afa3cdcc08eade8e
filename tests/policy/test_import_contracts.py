"""The arrows of docs: who may import whom. The contracts themselves stand in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def tree(folders, tmp_path):
    """The layout of a wheel; import-linter cannot follow ``dirotq.__path__`` (see the Makefile)."""
    only_python = lambda folder, names: [  # noqa: E731
        name for name in names if not (name.endswith(".py") or Path(folder, name).is_dir())
    ]
    for package, folder in folders.items():
        target = tmp_path.joinpath(*package.split("."))
        shutil.copytree(folder, target, ignore=only_python, dirs_exist_ok=True)
    (tmp_path / "dirotq" / "kernels" / "__init__.py").touch()
    return tmp_path


def lint(tree, root):
    code = "import sys; from importlinter.cli import lint_imports_command as c; c()"
    config = ["--config", str(root / "pyproject.toml"), "--no-cache", "--no-logo"]
    return subprocess.run(
        [sys.executable, "-c", code, *config], cwd=tree, capture_output=True, text=True, check=False
    )


def test_contracts_hold(tree, root):
    done = lint(tree, root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("stages/rank.py", "import dirotq.stages.gptq"),
        ("pipeline/dag.py", "import torch"),
        ("pipeline/store.py", "import dirotq.stages.rank"),
        ("kernels/formats/spec.py", "import dirotq.models.family"),
        ("kernels/chip.py", "import dirotq.kernels.plan"),
        ("models/family.py", "import dirotq.stages.rank"),
    ],
)
def test_a_forbidden_import_is_noticed(tree, root, file, line):
    path = tree / "dirotq" / file
    assert path.exists()
    path.write_text(f"{line}\n{path.read_text()}")
    done = lint(tree, root)
    assert done.returncode != 0
    assert "BROKEN" in done.stdout, done.stdout + done.stderr
