"""The root folders are packages under dirotq, in a checkout and in a wheel, and hide no other."""

import fnmatch
import os
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest

from dirotq.pipeline import remote_errors
from dirotq.pipeline.wording import EXTRAS


@pytest.fixture(scope="session")
def pyproject(root):
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.fixture(scope="session")
def tool(pyproject):
    return pyproject["tool"]["setuptools"]


def run(code, *, cwd, path):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, path)))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_folder_of_code_is_listed(tool, folders):
    found = set()
    for package, folder in folders.items():
        for path in folder.rglob("*.py"):
            inner = path.parent.relative_to(folder).parts
            found.add(".".join((package, *inner)))
    assert found == set(tool["packages"])


def test_package_dir_maps_every_root_folder(tool, folders):
    assert tool["package-dir"] == {package: folder.name for package, folder in folders.items()}


def test_every_extra_is_used(pyproject):
    """By a launcher of Hydra's, a URL's protocol, or imports; dev holds what the tests need."""
    extras = pyproject["project"]["optional-dependencies"]
    named = {*EXTRAS.values(), *remote_errors.EXTRAS.values()}
    assert {"attention", "clusters", "dev", "humming", "judge", "metrics", "s3test", *named} == set(
        extras
    )
    assert extras["clusters"] == ["dirotq[ray,search,slurm,sweep]"]
    assert "dirotq[judge,slurm,sweep]" in extras["dev"] and "dirotq[s3]" in extras["s3test"]


def test_every_data_file_is_shipped(tool, folders):
    for package in ("dirotq", "dirotq.conf", "dirotq.assets"):
        folder, patterns = folders[package], tool["package-data"][package]
        for path in folder.rglob("*"):
            if path.is_dir() or path.suffix == ".py" or "__pycache__" in path.parts:
                continue
            name = path.relative_to(folder).as_posix()
            shipped = any(fnmatch.fnmatch(f"/{name}", f"/{p}".replace("/**", "")) for p in patterns)
            assert shipped, f"{package}: {name} matches none of {patterns}"


def test_kernels_has_no_init(root):
    """With one, ``import kernels`` in a checkout would find ours instead of Hugging Face's."""
    assert not (root / "kernels" / "__init__.py").exists()


def test_an_installed_package_called_kernels_wins(root, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    found = run("import kernels; print(kernels.__file__)", cwd=root, path=[root, tmp_path])
    assert found == str(tmp_path / "kernels" / "__init__.py")


def test_hugging_faces_kernels_import_from_the_root(root):
    """diffusers from there: tests/dirotq/test_registration.py."""
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("the package kernels isn't installed")
    assert "site-packages" in run("import kernels; print(kernels.__file__)", cwd=root, path=[root])


def test_imports_from_any_working_folder(root, tmp_path):
    code = "import dirotq.pipeline, dirotq.conf, dirotq.kernels; print(dirotq.pipeline.__file__)"
    assert run(code, cwd=tmp_path, path=[root]) == str(root / "pipeline" / "__init__.py")
