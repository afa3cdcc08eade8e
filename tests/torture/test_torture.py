"""Seconds of `make torture`: a few attempts of most kinds, none of which may go wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FEW = {"kills": 1, "power": 1, "damage": 4, "disk": 2, "races": 1, "places": 9}
"""Each way to fill a disk and each place once. tests/stages/test_line.py kills at known moments,
test_machines.py has workers and heads."""
UNTIL = "--until=basis"
"""A stage that reads a model, and one that reads an artifact."""


@pytest.mark.slow
def test_a_few_of_every_kind():
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"
    done = subprocess.run(
        [sys.executable, "-m", "torture", UNTIL, *(f"--{k}={count}" for k, count in FEW.items())],
        env=dict(os.environ, PYTHONPATH=path),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) >= len(FEW)
