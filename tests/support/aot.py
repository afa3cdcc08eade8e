"""Compile every build of some ops for chips that are not here: ``python aot.py w4a16_linear``.

Prints one JSON line per build and chip: what ptxas made of it, or the error. Runs as a program of
its own, because TRITON_INTERPRET (set in tests without a GPU) makes compiling impossible.

Chips of a family get one PTX, which is most of the work; ptxas runs for each of them. That Triton
writes the same PTX for all of them is looked at with the first build of every kernel.
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
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from dirotq.kernels.build import Build

WORKERS = 2
FAMILIES = ((80, 86, 89), (90,), (100,), (120,))
"""Chips between which ptxas alone makes a difference."""
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
    kernel = _function(build)
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
    target = GPUTarget("cuda", chip, 32)
    return triton.compile(source, target=target, options=build.config.options)


def _function(build: Build) -> JITFunction:
    kernel = build.kernel
    while not isinstance(kernel, JITFunction):  # under autotune or heuristics
        kernel = kernel.fn
    return kernel


def retargeted(ptx: str, chip: int) -> str:
    """``ptx`` of one chip for another of its family."""
    text, count = re.subn(r"(?m)^\.target sm_\d+", f".target sm_{chip}", ptx)
    if count != 1:
        raise RuntimeError(f"{count} targets in the PTX")
    return text


def assembled(ptx: str, chip: int) -> bytes:
    """The machine code of ``ptx``, by Triton's own call of ptxas."""
    backend = make_backend(GPUTarget("cuda", chip, 32))
    stages: dict[str, Any] = {}
    backend.add_stages(stages, backend.parse_options({}), Language.TRITON)
    return stages["cubin"](ptx, {})


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


def _rows(op: str, family: tuple[int, ...]) -> list[dict[str, Any]]:
    """What became of every build of ``op`` for the chips of one family."""
    found: list[dict[str, Any]] = []
    cubins: dict[int, bytes] = {}
    compared = set()
    for build in _builds(op):
        chips = [chip for chip in family if chip in build.chips]
        compare = len(chips) > 1 and _function(build) not in compared
        if compare:
            compared.add(_function(build))
        first = None
        for chip in chips:
            row = {"op": op, "build": build.name, "chip": chip}
            row |= {"tensor_core": build.tensor_core, "may_spill": build.spills}
            try:
                if first is None or compare:
                    binary = compiled(build, chip)
                    first = first or binary
                    cubin = binary.asm["cubin"]
                    if retargeted(first.asm["ptx"], chip) != binary.asm["ptx"]:
                        raise RuntimeError(f"not the PTX of the other chips of {family}")
                else:
                    cubin = assembled(retargeted(first.asm["ptx"], chip), chip)
                row |= {"shared": int(first.metadata.shared), **measured(cubin)}
                cubins[len(found)] = cubin
            except Exception as error:  # noqa: BLE001 - whatever the compiler raises is the finding
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
            found.append(row)
    # The newest of the family knows the instructions of all.
    disassembled = listings(list(cubins.values()), family[-1]) if cubins else []
    for i, listing in zip(cubins, disassembled):
        found[i]["spills"] = len(SPILL.findall(listing))
        found[i]["matrix"] = sorted(set(MATRIX.findall(listing)))
    return found


def _builds(op: str) -> list[Build]:
    return importlib.import_module(f"builds.{op}").builds()


def main(ops: Sequence[str]) -> None:
    if os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: the interpreter replaces the compiler")
    for op in ops:
        _builds(op)
    # Forked: triton and torch are loaded once, and kernels (which can't be pickled) are there.
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(WORKERS, mp_context=fork) as pool:
        for rows in pool.map(_rows, *zip(*itertools.product(ops, FAMILIES))):
            for row in rows:
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
