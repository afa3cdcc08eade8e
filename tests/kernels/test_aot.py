"""Every build of every op, compiled for chips that are not here (tests/support/aot.py)."""

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from dirotq.kernels.build import FP8_CHIPS

ROOT = Path(__file__).resolve().parents[2]
OPS = {path.parent.name for path in (ROOT / "kernels").glob("*/kernel.py")}
LARGE = {"attention", "fp4_linear", "transform_quantize", "w4a16_linear", "w4a4_linear"}
"""Ops with builds for a process of their own; the others share one."""
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that one program may have, by compute capability."""
FP8_ONLY = {"attention", "fp8_qkv"}
"""Ops that only chips with FP8 matrix units have kernels for."""


def rows(ops: Collection[str], cache: Path) -> list[dict]:
    """What tests/support/aot.py reports, one entry per build and chip."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, ROOT / "tests" / "support" / "aot.py", *ops]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def problems(row: dict) -> list[str]:
    """Why this build must not run on this chip."""
    if "error" in row:
        return [row["error"]]
    found = []
    if row["tensor_core"] and not row["matrix"]:
        found.append("no matrix instruction")
    # Not the stack alone: a function call has one and spills nothing.
    if row["spills"] > row["may_spill"]:
        found.append(f"{row['spills']} instructions spill registers ({row['stack']} bytes)")
    if row["shared"] > SHARED[row["chip"]] * 1024:
        found.append(f"{row['shared']} bytes of shared memory, {SHARED[row['chip']]} KiB allowed")
    return found


def test_every_op_with_a_kernel_is_here():
    assert LARGE < OPS


@pytest.mark.aot
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "ops", [*([op] for op in sorted(LARGE)), sorted(OPS - LARGE)], ids="-".join
)
def test_every_build_compiles_for_its_chips(ops, tmp_path):
    pytest.importorskip("triton")
    report = rows(ops, tmp_path / "cache")
    bad = {f"{r['build']} on sm_{r['chip']}": found for r in report if (found := problems(r))}
    assert bad == {}
    for op in ops:
        chips = {row["chip"] for row in report if row["op"] == op}
        assert chips == set(FP8_CHIPS if op in FP8_ONLY else SHARED), op


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, []),
        ({"matrix": []}, ["no matrix instruction"]),
        ({"matrix": [], "tensor_core": False}, []),
        ({"spills": 4, "stack": 16}, ["4 instructions spill registers (16 bytes)"]),
        ({"spills": 4, "may_spill": 4}, []),
        ({"stack": 16}, []),
        ({"shared": 99 * 1024 + 1}, ["101377 bytes of shared memory, 99 KiB allowed"]),
        ({"error": "CompilationError"}, ["CompilationError"]),
    ],
)
def test_problems(change, said):
    sound = {"tensor_core": True, "matrix": ["HMMA"], "spills": 0, "may_spill": 0, "stack": 0}
    sound |= {"shared": 512}
    assert problems(sound | {"chip": 86} | change) == said


def test_the_compiler_is_really_asked(tmp_path):
    """An op without a kernel must not pass for one without builds."""
    with pytest.raises(AssertionError, match="hadamard"):
        rows(["hadamard"], tmp_path / "cache")
