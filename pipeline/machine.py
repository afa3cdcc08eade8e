"""The machine that a run would use, as effective rates, found without touching its GPU.

Rates of a chip that was not measured are published peaks times the efficiency measured on an H200.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from dirotq.errors import ConfigError
from dirotq.pipeline.cost import Machine
from dirotq.pipeline.provenance import versions

__all__ = ["CHIPS", "Chip", "cpu", "find", "graphics", "refuse_device"]


@dataclass(frozen=True, slots=True)
class Chip:
    """Published dense peaks in TFLOP/s: bf16 with float32 sums, float32, float64."""

    name: str
    bf16: float
    float32: float
    float64: float


ARITHMETIC = ("network", "moments", "float32", "float64", "eigh")

CHIPS = (
    # A part of the name that nvidia-smi prints; the first that is found in it counts.
    Chip("B200", 2250, 75, 37),
    Chip("H100 PCIe", 756, 51, 51),
    Chip("H200", 989, 67, 67),
    Chip("H100", 989, 67, 67),
    Chip("A100", 312, 19.5, 19.5),
    Chip("A10G", 70, 31, 0.5),
    Chip("A10", 125, 31, 1.0),
    Chip("A40", 150, 37, 0.6),
    Chip("RTX A6000", 155, 39, 0.6),
    Chip("RTX 6000 Ada", 364, 91, 1.4),
    Chip("L40S", 362, 92, 1.4),
    Chip("L40", 181, 91, 1.4),
    Chip("L4", 121, 30, 0.5),
    Chip("RTX 5090", 210, 105, 1.6),
    Chip("RTX 4090", 165, 83, 1.3),
    Chip("RTX 4080", 97, 49, 0.8),
    Chip("RTX 3090", 71, 36, 0.56),
)
UNKNOWN = Chip("RTX 3090", 71, 36, 0.56)
"""What a chip that is not listed is taken for; the machine's name then says so."""

H200 = Machine(
    name="NVIDIA H200", gpu=True, vram=0, ram=0,
    # FLUX.1-dev at 1024 x 1024 takes 174 ms eager: 74 TFLOP at 3072 channels.
    network=636e12, network_half=1500,
    # The kernel reaches 1387 TFLOP/s at 15360 channels, 665 at 3072, as if all were computed.
    moments=1900e12, moments_half=5720,
    float32=45e12, float64=40e12, eigh=1e12,
    load=4.0e9, read=2.5e9, write=0.65e9, park=45e9,
    start=10.0, site=0.02, block=0.8e-3, column=8e-6, factor=1.5e-3,
    base_ram=3.0e9, slack=1.35,
)  # fmt: skip
"""Measured on one H200 SXM (torch 2.11): all other GPUs are scaled from this entry."""

CORE = Machine(
    name="CPU", gpu=False, vram=0, ram=0,
    network=80e9, network_half=100, moments=80e9, moments_half=100, float32=40e9, float64=20e9,
    eigh=25e9,
    load=1.0e9, read=0.8e9, write=0.3e9, park=10e9,
    start=6.0, site=2e-3, block=1e-3, column=60e-6, factor=20e-3,
    base_ram=0.9e9, slack=1.2,
)  # fmt: skip
"""Measured on one core of a 2.8 GHz Xeon; rates of arithmetic grow with the cores."""


DRIVER = Path("/proc/driver/nvidia/version")
"""Is there where the kernel has NVIDIA's driver."""


def find(device: str) -> Machine:
    """The machine behind ``device`` (``auto``, ``cpu``, ``cuda`` or ``cuda:N``)."""
    found = graphics() if device != "cpu" else []
    index = int(device.partition(":")[2] or 0)
    if not found or (versions()["torch"] or "").endswith("+cpu"):
        return cpu(os.cpu_count() or 1, _ram())
    name, memory = found[min(index, len(found) - 1)]
    return gpu(name, memory, _ram())


def refuse_device(device: str, setting: str) -> None:
    """Raise ConfigError for a device that has no such name, or that this machine does not have.

    setting  under which it was given
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ConfigError(f"{setting}={device} is unknown; use auto, cpu, cuda or cuda:N")
    if not device.startswith("cuda"):
        return
    advice = f"use {setting}=cpu or {setting}=auto"
    torch = versions()["torch"] or ""
    if torch.endswith("+cpu"):
        raise ConfigError(
            f"{setting}={device}, and the torch that is installed ({torch}) is built without CUDA; "
            f"{advice}, or install a build with CUDA"
        )
    found = graphics()
    if not found and shutil.which("nvidia-smi") is None and DRIVER.exists():
        return  # a container without NVIDIA's tools: torch will tell
    index = int(device.partition(":")[2] or 0)
    if index >= len(found):
        there = f"{len(found)} GPU{'s' * (len(found) > 1)}" if found else "no usable GPU"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        within = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise ConfigError(
            f"{setting}={device}, but nvidia-smi finds {there} here{within}; {advice}"
        )


def gpu(name: str, memory: int, ram: int) -> Machine:
    """The entry of the GPU that nvidia-smi calls ``name``, with so many bytes of memory."""
    chip = next((chip for chip in CHIPS if chip.name in name), None)
    measured = next(chip for chip in CHIPS if chip.name == "H200")
    if chip is None:
        chip, name = UNKNOWN, f"{name} (not in the table of chips, taken for an {UNKNOWN.name})"
    return replace(
        H200,
        name=name,
        vram=memory,
        ram=ram,
        network=H200.network * chip.bf16 / measured.bf16,
        moments=H200.moments * chip.bf16 / measured.bf16,
        float32=H200.float32 * chip.float32 / measured.float32,
        float64=H200.float64 * chip.float64 / measured.float64,
        eigh=H200.eigh * min(chip.float64 / measured.float64 * 10, 1),  # mostly memory and latency
    )


def cpu(cores: int, ram: int) -> Machine:
    """A machine without a GPU."""
    rates = {n: getattr(CORE, n) * cores for n in ARITHMETIC}
    return replace(CORE, name=f"CPU, {cores} cores", ram=ram, **rates)


def graphics() -> list[tuple[str, int]]:
    """Name and bytes of memory of each GPU that CUDA would see; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in done.stdout.strip().splitlines()]
    found = [(name.strip(), int(mib) << 20) for name, _, mib in rows if mib.strip().isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    # Numbers are in nvidia-smi's order; of UUIDs only the count can be told.
    names = [entry.strip() for entry in visible.split(",") if entry.strip()]
    numbers = [int(n) if n.isdigit() else i for i, n in enumerate(names) if n != "-1"]
    return [found[number] for number in numbers if number < len(found)]


def _ram() -> int:
    """Bytes of host memory that can be had: what is available, within a container's limit."""
    limits = [1 << 62]  # where nothing tells, it is unknown, and refuses nothing
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.is_file() else ():
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups 2 and 1
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)
