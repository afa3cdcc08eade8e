"""What loading a folder adds to the host memory of a process that does nothing else.

Run as ``python loading_peak.py diffusers.FluxTransformer2DModel folder ...``, a class and a folder
as often as wanted; prints bytes, each on a line.
"""

import gc
import importlib
import os
import re
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

gc.disable()  # until all is imported

import torch  # noqa: E402

import dirotq  # noqa: E402, F401 - registers the quantizer
from dirotq.device import release  # noqa: E402


def resident() -> int:
    """Bytes of host memory that this process holds, mapped files among them."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@contextmanager
def watched():
    """The most that host memory grows by, in the list that is yielded."""
    gc.collect()
    before, peak, done = resident(), [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident() - before)
            time.sleep(0.0005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        peak[0] = max(peak[0], resident() - before)
        done.set()
        thread.join()


def measure(name: str, folder: str) -> int:
    module, _, cls = name.rpartition(".")
    load = getattr(importlib.import_module(module), cls).from_pretrained
    load(folder, dtype=torch.bfloat16)  # imports, caches
    release(torch.device("cpu"))  # what the next load would lie in without growing
    gc.freeze()
    gc.enable()
    with watched() as peak:
        made = load(folder, dtype=torch.bfloat16)
        for tensor in made.parameters():
            tensor.flatten().view(torch.uint8)[::4096].sum()  # what is mapped is read
    return peak[0]


def main(*asked: str) -> None:
    """Measure each in a fork, which has nothing of the others."""
    for name, folder in zip(asked[::2], asked[1::2]):
        if not (child := os.fork()):
            print(measure(name, folder), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"{name}: status {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
