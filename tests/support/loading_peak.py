"""What loading a folder adds to the host memory of a process that does nothing else.

Run as ``python loading_peak.py diffusers.FluxTransformer2DModel folder``; prints bytes.
"""

import gc
import importlib
import re
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

import dirotq  # noqa: F401 - registers the quantizer


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


def main(name: str, folder: str) -> None:
    module, _, cls = name.rpartition(".")
    load = getattr(importlib.import_module(module), cls).from_pretrained
    load(folder, dtype=torch.bfloat16)  # imports, caches
    with watched() as peak:
        made = load(folder, dtype=torch.bfloat16)
        for tensor in made.parameters():
            tensor.flatten().view(torch.uint8)[::4096].sum()  # what is mapped is read
    print(peak[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
