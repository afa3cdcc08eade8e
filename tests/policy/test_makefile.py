import re
import shutil
import subprocess

import pytest

TARGETS = ["help", "setup", "compress", "plan", "sweep", "test", "check", "bench", "clean"]


def make(root, *args):
    done = subprocess.run(
        ["make", *args], cwd=root, capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(autouse=True)
def has_make():
    if not shutil.which("make"):
        pytest.skip("no make here")


def test_help_is_the_default_and_names_every_target(root):
    status, out = make(root)
    assert status == 0
    listed = re.findall(r"^([\w-]+) {2,}\S", out, re.MULTILINE)
    assert set(TARGETS) <= set(listed)
    phony = re.search(r"^\.PHONY: (.*)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert set(listed) == set(phony[1].split())


def test_targets_make_their_environment_first(root, tmp_path):
    for target in ("compress", "plan", "sweep", "test", "check", "bench"):
        status, out = make(root, "-n", target, f"VENV={tmp_path / 'venv'}")
        assert status == 0
        made, installed, *used = [line for line in out.splitlines() if f"{tmp_path}/venv" in line]
        assert "-m venv" in made
        assert "pip install" in installed
        assert used


def test_model_and_args_reach_the_command_line(root, tmp_path):
    args = [f"VENV={tmp_path}", "MODEL=a folder", "ARGS=rank.r=32"]
    out = make(root, "-n", "compress", *args)[1]
    assert f'{tmp_path}/bin/dirotq compress "model=a folder" rank.r=32' in out
    assert "--multirun" in make(root, "-n", "sweep", f"VENV={tmp_path}")[1]


def test_the_checkout_of_diffusers_is_the_users(root, tmp_path):
    status, out = make(root, "-n", "test-diffusers", f"VENV={tmp_path}", "DIFFUSERS=/some/where")
    assert status == 0
    assert "DIFFUSERS_CHECKOUT=/some/where" in out and "tests/diffusers_mixins" in out
    assert "git clone" in out  # where there is none


def test_an_old_python_is_named_as_the_problem(root, tmp_path):
    status, out = make(root, "setup", f"VENV={tmp_path / 'venv'}", "PYTHON=")
    assert status != 0
    assert "Python 3.11 or newer is needed" in out


def test_ci_runs_check_and_test(root):
    script = (root / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script
    assert script.index("make check") < script.index("make test")
    assert (root / ".ci" / "run").stat().st_mode & 0o111
