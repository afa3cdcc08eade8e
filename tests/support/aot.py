"""Compile every build of an op for chips that are not here: ``python aot.py w4a16_linear``.

Prints one JSON line per build and chip: what ptxas made of it, or the error. Runs as a program of
its own, because TRITON_INTERPRET (set in tests without a GPU) makes compiling impossible.
"""

import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from dirotq.kernels.build import Build

WORKERS = 2
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"\b(?:[HIQOB]G?MMA|UTC\w*MMA)\b")
SPILL = re.compile(r"\b(?:LDL|STL)\b")
USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+)")


def compiled(build: Build, chip: int) -> Any:
    """``build`` for compute capability ``chip`` (90: 9.0), as ``triton.compile`` returns it."""
    kernel = build.kernel
    while not isinstance(kernel, JITFunction):  # under autotune or heuristics
        kernel = kernel.fn
    names = kernel.arg_names
    unknown = {*build.signature, *build.constants, *build.aligned} ^ set(names)
    if unknown:
        raise ValueError(f"arguments of the build and of the kernel differ by {sorted(unknown)}")
    source = ASTSource(
        fn=kernel,
        signature={n: build.signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in build.constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in build.aligned},
    )
    options = {"num_warps": build.warps, "num_stages": build.stages, "maxnreg": build.registers}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def measured(build: Build, chip: int) -> dict[str, Any]:
    """Registers, bytes of stack, spilling instructions, bytes of shared memory, matrix opcodes."""
    binary = compiled(build, chip)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        listing = _tool("cuobjdump", "-res-usage", "-sass", file.name)
    usage = USAGE.search(listing)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing about registers: {listing[:200]!r}")
    return {
        "registers": int(usage["registers"]),
        "stack": int(usage["stack"]),
        "spills": len(SPILL.findall(listing)),
        "shared": int(binary.metadata.shared),
        "matrix": sorted(set(MATRIX.findall(listing))),
    }


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return run.stdout


def _line(op: str, index: int, chip: int) -> str:
    build = _builds(op)[index]
    row = {"build": build.name, "chip": chip, "tensor_core": build.tensor_core}
    try:
        row |= measured(build, chip)
    except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the finding
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    return json.dumps(row)


def _builds(op: str) -> list[Build]:
    return importlib.import_module(f"dirotq.kernels.{op}.kernel").builds()


def main(op: str) -> None:
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: the interpreter replaces the compiler")
    pairs = [(i, chip) for i, build in enumerate(_builds(op)) for chip in build.chips]
    # Forked: triton and torch are loaded once, and kernels (which can't be pickled) are there.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(WORKERS, mp_context=fork) as pool:
        for line in pool.map(_line, itertools.repeat(op), *zip(*pairs)):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
