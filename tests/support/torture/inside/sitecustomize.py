"""Faults of one machine, for whichever interpreter starts on it. TORTURE, in JSON, says which.

clock   its clock is off by so many seconds
full    its disk is full: every file that it makes outside of this folder, the store, fails
within  the same inside of the store, from the file of number ``after`` on
once    only the process that makes this file first has the fault, and writes its id there
"""

import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MAKING = ("open", "os.rename", "os.mkdir")
SYSTEM = ("/dev/", "/proc/", "/sys/")


def _hurt(fault: dict[str, Any]) -> None:
    if "clock" in fault:
        plain, plain_ns = time.time, time.time_ns
        time.time = lambda: plain() + fault["clock"]
        time.time_ns = lambda: plain_ns() + int(fault["clock"] * 1e9)
    if "full" in fault or "within" in fault:
        _fill(str(fault.get("full", fault.get("within"))), "within" in fault, fault.get("after", 0))


def _fill(store: str, inside: bool, after: int) -> None:
    left = after

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in MAKING or not isinstance(args[0], str | os.PathLike):
            return
        flags = args[2] if event == "open" and isinstance(args[2], int) else os.O_CREAT
        path = str(Path(os.fsdecode(args[0])).absolute())
        if path.startswith(SYSTEM) or not flags & os.O_CREAT:
            return
        if path.startswith(store) == inside:
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    sys.addaudithook(hook)


def _first(place: str) -> bool:
    try:
        with Path(place).open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


if "TORTURE" in os.environ and "spawn_main" in " ".join(sys.orig_argv):
    told = json.loads(os.environ["TORTURE"])
    if _first(told["once"]):
        _hurt(told)
