"""NVIDIA's GPUs as the driver's library (NVML) tells of them: no torch, no context on a GPU."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import pynvml

DRIVER = Path("/proc/driver/nvidia/version")
"""Is there where the kernel has NVIDIA's driver."""


@dataclass(frozen=True, slots=True)
class Graphics:
    """One GPU; ``memory`` in bytes, ``capability`` as "9.0"."""

    name: str
    memory: int
    capability: str
    driver: str

    def __str__(self) -> str:
        return f"{self.name}, {self.capability}, {self.driver}"


def installed() -> tuple[Graphics, ...]:
    """List the GPUs of this machine; none where there is no driver, or it fails."""
    return _asked() or ()


def visible() -> tuple[Graphics, ...]:
    """List those of them that CUDA would see."""
    found, wanted = installed(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return found
    # Numbers are in NVML's order; of UUIDs only the count can be told.
    names = [entry.strip() for entry in wanted.split(",") if entry.strip()]
    numbers = [int(n) if n.isdigit() else i for i, n in enumerate(names) if n != "-1"]
    return tuple(found[number] for number in numbers if number < len(found))


def hidden() -> bool:
    """Tell whether there is a driver that can't be asked, as in a container without its library."""
    return _asked() is None and DRIVER.exists()


@functools.cache
def _asked() -> tuple[Graphics, ...] | None:
    """Ask the library; None where it is missing or fails."""
    try:
        pynvml.nvmlInit()
        try:
            driver = pynvml.nvmlSystemGetDriverVersion()
            return tuple(_graphics(i, driver) for i in range(pynvml.nvmlDeviceGetCount()))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def _graphics(index: int, driver: str) -> Graphics:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Graphics(
        name=pynvml.nvmlDeviceGetName(handle),
        memory=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        capability=f"{major}.{minor}",
        driver=driver,
    )
