"""What a run loads when there is nothing to do: `make compress` of a finished model is quick."""

import subprocess
import sys

SLOW = (
    "openai", "diffusers", "transformers", "datasets", "pandas", "torchmetrics", "sympy",
)  # fmt: skip
JUDGED = ["model=tiny_flux", "pipeline=judged", "judge=openai", "judge.backend.model=m"]
SCRIPT = f"""
import gc, sys
gc.disable()
from dirotq import cli
from dirotq.pipeline import config
from dirotq.pipeline.settings import make
cfg = config.compose_config({JUDGED!r}, "dirotq.conf")
for name in cfg.pipeline:
    make(cfg[name], name)
print([name for name in {SLOW!r} if name in sys.modules])
"""


def test_stages_are_made_without_the_slow_libraries():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_command_line_itself_loads_no_torch():
    script = "import sys, dirotq.cli; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
