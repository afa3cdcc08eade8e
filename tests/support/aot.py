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
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/")
INSTRUCTION_BYTES = 16
EXECUTABLE = 4
"""SHF_EXECINSTR, the flag of an ELF section that holds machine code."""
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


def measured(cubin: bytes) -> dict[str, Any]:
    """Registers and bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        said = _tool("cuobjdump", "-res-usage", file.name)
    usage = USAGE.search(said)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing about registers: {said[:200]!r}")
    return {name: int(value) for name, value in usage.groupdict().items()}


def listings(cubins: Sequence[bytes], chip: int) -> list[str]:
    """The machine code of each, disassembled.

    In one go: nvdisasm takes up to half a second to start, and no time for a kernel.
    """
    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        Path(file.name).write_bytes(b"".join(codes))
        arch = f"SM{chip}a" if chip >= 90 else f"SM{chip}"
        said = _tool("nvdisasm", "--binary", arch, "-novliw", "-ndf", file.name)
    lines = said.splitlines()
    instructions = [line for line in lines if INSTRUCTION.match(line)]
    counts = [len(code) // INSTRUCTION_BYTES for code in codes]
    if len(instructions) != sum(counts):
        raise RuntimeError(f"nvdisasm lists {len(instructions)} of {sum(counts)} instructions")
    rest = iter(instructions)
    return ["\n".join(itertools.islice(rest, count)) for count in counts]


def machine_code(cubin: bytes) -> bytes:
    """The executable sections of a cubin, which is a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    found = b""
    for i in range(count):
        flags, _, offset, length = struct.unpack_from("<4Q", cubin, table + i * size + 8)
        if flags & EXECUTABLE:
            found += cubin[offset : offset + length]
    return found


def _tool(name: str, *arguments: str) -> str:
    run = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return run.stdout


def _rows(op: str, chip: int) -> list[dict[str, Any]]:
    """What became of every build of ``op`` for one chip."""
    found, cubins = [], {}
    for build in _builds(op):
        if chip not in build.chips:
            continue
        row = {"build": build.name, "chip": chip, "tensor_core": build.tensor_core}
        try:
            binary = compiled(build, chip)
            cubins[len(found)] = binary.asm["cubin"]
            row |= {"shared": int(binary.metadata.shared), **measured(binary.asm["cubin"])}
        except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the finding
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
        found.append(row)
    disassembled = listings(list(cubins.values()), chip) if cubins else []
    for i, listing in zip(cubins, disassembled):
        found[i]["spills"] = len(SPILL.findall(listing))
        found[i]["matrix"] = sorted(set(MATRIX.findall(listing)))
    return found


def _builds(op: str) -> list[Build]:
    return importlib.import_module(f"dirotq.kernels.{op}.kernel").builds()


def main(op: str) -> None:
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: the interpreter replaces the compiler")
    chips = sorted({chip for build in _builds(op) for chip in build.chips})
    # Forked: triton and torch are loaded once, and kernels (which can't be pickled) are there.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(WORKERS, mp_context=fork) as pool:
        for rows in pool.map(_rows, itertools.repeat(op), chips):
            for row in rows:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
