"""`make release`: sdist and wheel of the committed tree, checked; says what to upload.

usage: python .ci/release.py [--out dist]

Nothing is uploaded or tagged, and no network is needed.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
BUILD = (
    "import sys; from setuptools import build_meta\n"
    "print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    out = parser.parse_args(argv).out.absolute()
    found = [*uncommitted(ROOT), *disagreements(ROOT)]
    if found:
        print("not ready for a release:", *(f"- {problem}" for problem in found), sep="\n")
        return 1
    with tempfile.TemporaryDirectory() as name:
        source = Path(name, "source")
        committed(ROOT, source)
        files = build(source, out)
        site = Path(name, "site")
        install(files[1], site)
        told = run_installed(site, Path(name), "--version").strip()
        run_installed(site, Path(name), "plan", "model=tiny_flux")
    print(f"{told}: sdist and wheel are built, the wheel runs outside of the checkout. To upload:")
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        print(f"  {file}  {file.stat().st_size / 1e6:.1f} MB  sha256 {digest}")
    version = told.split()[-1]
    print("with, in this order:")
    print(f"  git tag -a v{version} -m 'DiRotQ {version}' && git push origin v{version}")
    print(f"  python -m twine upload {' '.join(map(str, files))}")
    print("and the section of CHANGELOG.md as the text of the release.")
    return 0


def uncommitted(root: Path) -> list[str]:
    """Say what git would leave out of the release."""
    done = _run(["git", "-C", str(root), "status", "--porcelain"])
    return [f"{line[3:]} is not committed" for line in done.splitlines()]


def disagreements(root: Path) -> list[str]:
    """Say where the version is another one than pyproject.toml's, or has no notes."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    module = (root / "dirotq" / "__init__.py").read_text()
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    found = {
        "dirotq/__init__.py": re.search(r'^__version__ = "(.*)"$', module, re.MULTILINE)[1],
        "CITATION.cff": str(citation["version"]),
    }
    problems = [
        f"{place} says {other}, pyproject.toml {version}"
        for place, other in found.items()
        if other != version
    ]
    notes = re.findall(r"^## \[?([\d.]+)\]?", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    if version not in notes:
        problems.append(
            f"CHANGELOG.md has no section for {version}: put `## {version} - DATE` under Unreleased"
        )
    return problems


def committed(root: Path, source: Path) -> None:
    """Write the files of the last commit to the folder ``source``."""
    source.mkdir()
    archive = source.with_suffix(".tar")
    _run(["git", "-C", str(root), "archive", "--output", str(archive), "HEAD"])
    with tarfile.open(archive) as opened:
        opened.extractall(source, filter="data")


def build(source: Path, out: Path) -> tuple[Path, Path]:
    """Build the sdist of ``source``, and the wheel from what the sdist holds; both into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    sdist = out / _build("build_sdist", source, out)
    with tempfile.TemporaryDirectory() as name, tarfile.open(sdist) as opened:
        opened.extractall(name, filter="data")
        (unpacked,) = Path(name).iterdir()
        return sdist, out / _build("build_wheel", unpacked, out)


def install(wheel: Path, site: Path) -> None:
    """Install a wheel, without what it requires, into the folder ``site``."""
    _run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps",
         "--target", str(site), str(wheel)]
    )  # fmt: skip


def run_installed(site: Path, cwd: Path, *words: str) -> str:
    """Run the installed command on ``words`` in the folder ``cwd``; what it printed."""
    env = {**os.environ, "PYTHONPATH": str(site)}
    return _run([sys.executable, str(site / "bin" / "dirotq"), *words], cwd=cwd, env=env)


def _build(what: str, source: Path, out: Path) -> str:
    return _run([sys.executable, "-c", BUILD, what, str(out)], cwd=source).splitlines()[-1]


def _run(command: list[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
