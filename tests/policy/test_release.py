"""What is released: sdist and wheel, and the versions that it names."""

import importlib.util
import os
import re
import shutil
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

FILES = ("pyproject.toml", "LICENSE", "README.md", "CITATION.cff", "CHANGELOG.md")


@pytest.fixture(scope="session")
def release(root):
    spec = importlib.util.spec_from_file_location("release", root / ".ci" / "release.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def link_or_name(source, target):
    """A file itself, or of weights their name: packing them twice takes seconds."""
    if source.endswith(".safetensors"):
        Path(target).write_text(source)
    else:
        os.link(source, target)


def test_the_wheel_holds_all_that_runs(release, root, folders, tmp_path):
    """Built from a copy through the sdist; `make lowest` compresses a model with it."""
    source, out, site = (tmp_path / name for name in ("source", "out", "site"))
    for folder in folders.values():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, source / folder.name, ignore=ignored, copy_function=link_or_name)
    for name in FILES:
        shutil.copy(root / name, source / name)
    sdist, wheel = release.build(source, out)
    assert (sdist.name.endswith(".tar.gz"), wheel.name.endswith("-py3-none-any.whl")) == (True,) * 2
    release.install(wheel, site)
    shutil.rmtree(source)
    top = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert top == {"dirotq", "bin"}
    assert (site / "dirotq" / "py.typed").is_file()
    code = "import dirotq; print(dirotq.__file__)"
    where = release._run([os.sys.executable, "-c", code], tmp_path, {"PYTHONPATH": str(site)})
    assert where.strip() == str(site / "dirotq" / "__init__.py")


@pytest.fixture
def tree(root, tmp_path):
    """The files that name a version, ready for a release of 1.2.3."""
    (tmp_path / "dirotq").mkdir()
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md", "dirotq/__init__.py"):
        text = (root / name).read_text().replace("## Unreleased", "## Unreleased\n\n## 1.2.3 - now")
        (tmp_path / name).write_text(
            re.sub(r'^(_*version_* ?[=:] ?"?)[\d.]+', r"\g<1>1.2.3", text, flags=re.M)
        )
    return tmp_path


def test_one_version_everywhere(release, root, tree):
    assert release.disagreements(tree) == []
    said = [problem for problem in release.disagreements(root) if "CHANGELOG" not in problem]
    assert said == []  # the section of a version is written when it is released


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dirotq/__init__.py", "dirotq/__init__.py says 9.9.9, pyproject.toml 1.2.3"),
        ("CITATION.cff", "CITATION.cff says 9.9.9, pyproject.toml 1.2.3"),
        ("CHANGELOG.md", "CHANGELOG.md has no section for 1.2.3"),
    ],
)
def test_a_version_that_was_forgotten(release, tree, name, says):
    (tree / name).write_text((tree / name).read_text().replace("1.2.3", "9.9.9"))
    (problem,) = release.disagreements(tree)
    assert problem.startswith(says)


def test_what_is_not_committed_is_not_released(release, tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "one").write_text("1")
    assert release.uncommitted(tmp_path) == ["one is not committed"]
    git("add", "one")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-m", "x")
    assert release.uncommitted(tmp_path) == []
    (tmp_path / "two").write_text("2")
    release.committed(tmp_path, source := tmp_path.with_name("source"))
    assert [path.name for path in source.iterdir()] == ["one"]


def test_a_build_that_fails_is_told(release, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 3\n")
    with pytest.raises(SystemExit, match="failed:"):
        release.build(tmp_path, tmp_path / "out")


def test_the_citation_can_be_read(root):
    cited = yaml.safe_load((root / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} <= set(cited)
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= set(paper)


def test_the_table_of_versions_is_that_of_the_package(root):
    """docs/versions.md: each range as pyproject.toml has it, and what was run lies in it."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    wanted["Python"] = Requirement(f"python{project['requires-python']}").specifier
    rows = re.findall(
        r"^\| ([\w-]+) \| `([^`]+)` \| ([^|]+) \|$",
        (root / "docs" / "versions.md").read_text(),
        re.M,
    )
    assert {"Python", "torch", "triton", "diffusers", "transformers"} <= {row[0] for row in rows}
    for name, allowed, tested in rows:
        assert Requirement(f"x{allowed}").specifier == wanted[name], name
        for version in tested.split(","):
            assert version.strip() in wanted[name], f"{name} {version}"
        if name != "Python":
            assert metadata.version(name).partition("+")[0] in wanted[name]
