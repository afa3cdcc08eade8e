"""Run a part of the tests with the oldest version of each dependency that pyproject.toml allows.

usage: python .ci/lowest.py [FOLDER]

It makes a virtual environment in FOLDER (default: a temporary one). torch and triton stay at what
this interpreter has: their oldest versions come with gigabytes of CUDA.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AS_HERE = ("torch", "triton")
TOOLS = ("hypothesis", "pytest", "pytest-timeout")
TESTS = (
    "tests/stages/test_line.py", "tests/dirotq/sources/test_model.py", "tests/dirotq/test_cli.py",
    "tests/dirotq/test_registration.py", "tests/dirotq/evaluate/test_report.py",
    "tests/pipeline/test_multirun.py", "tests/pipeline/test_quoting.py",
    "tests/pipeline/test_remote_store.py",
)  # fmt: skip


def oldest(requirement: str) -> str:
    """Return "zarr==3.1.6" of "zarr>=3.1.6,<4; a marker"."""
    found = re.match(r"([\w-]+)>=([\w.]+)", requirement)
    if found is None:
        raise SystemExit(f"pyproject.toml: {requirement!r} names no oldest version")
    name, least = found.groups()
    return f"{name}=={version(name).partition('+')[0] if name in AS_HERE else least}"


def main(folder: Path) -> int:
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [oldest(requirement) for requirement in project["dependencies"]]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted, *TOOLS], check=True)
    tests = [python, "-m", "pytest", "-q", "-m", "not download and not aot and not gpu", *TESTS]
    return subprocess.run(tests, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory(prefix="lowest-") as made:
        sys.exit(main(Path(made)))
