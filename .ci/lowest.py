"""Run the wheel, and a part of the tests, with the oldest version of each dependency that
pyproject.toml allows.

usage: python .ci/lowest.py [FOLDER]

It makes a virtual environment in FOLDER (default: a temporary one). torch and triton stay at what
this interpreter has: their oldest versions come with gigabytes of CUDA.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from importlib.metadata import version
from pathlib import Path

import release

ROOT = Path(__file__).resolve().parents[1]
AS_HERE = ("torch", "triton")
TOOLS = ("hypothesis", "pytest", "pytest-timeout")
TESTS = (
    "tests/stages/test_line.py", "tests/dirotq/sources/test_model.py", "tests/dirotq/test_cli.py",
    "tests/dirotq/test_registration.py", "tests/dirotq/evaluate/test_report.py",
    "tests/pipeline/test_multirun.py", "tests/pipeline/test_quoting.py",
    "tests/pipeline/test_remote_store.py", "tests/dirotq/packed/test_text_quantizer.py",
    "tests/stages/test_text_encoders.py",
)  # fmt: skip
FEW = (
    "prompts.calibration.count=4", "capture.calls=16", "prompts.heldout.count=2",
    "validate.pairs=1", "reference.floor=false", "+model.call.num_inference_steps=2", "device=cpu",
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
    compress_elsewhere(python, folder)
    tests = [python, "-m", "pytest", "-q", "-m", "not download and not aot and not gpu", *TESTS]
    return subprocess.run(tests, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=False).returncode


def compress_elsewhere(python: Path, folder: Path) -> None:
    """Install the last commit's wheel, and compress a model with it outside of the checkout."""
    release.committed(ROOT, folder / "source")
    _, wheel = release.build(folder / "source", folder / "dist")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    dirotq = [folder / "bin" / "dirotq", "compress", "model=tiny_flux", *FEW]
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    subprocess.run(dirotq, cwd=elsewhere, env=environment, check=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1])))
    with tempfile.TemporaryDirectory(prefix="lowest-") as made:
        sys.exit(main(Path(made)))
