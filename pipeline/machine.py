"""The machine that a run would use, found without touching its GPU."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from dirotq.errors import ConfigError
from dirotq.pipeline import graphics
from dirotq.pipeline.provenance import versions

Forwards = tuple[int, float]
"""How many, of one prompt and one branch of guidance, and their FLOPs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a run of a stage takes of a machine: bytes at the peak, and bytes left on the disk.

    ``bound``  the memory is an upper bound; without it, an estimate within a quarter
    ``lower``  settings that would lower the memory, for the message that refuses it
    ``forwards``  of the model, by what they are for
    """

    vram: float = 0.0
    ram: float = 0.0
    disk: float = 0.0
    bound: bool = False
    lower: str = ""
    forwards: Mapping[str, Forwards] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """``vram``, ``ram``: bytes of GPU memory (0 without a GPU), and of host memory to be had."""

    name: str
    vram: int
    ram: int

    @property
    def gpu(self) -> bool:
        return self.vram > 0

    @property
    def width(self) -> int:
        """Bytes of a number of the denoiser's compute dtype."""
        return 2 if self.gpu else 4


def find(device: str) -> Machine:
    """Describe the machine behind ``device`` (``auto``, ``cpu``, ``cuda`` or ``cuda:N``)."""
    found = graphics.visible() if device != "cpu" else ()
    if not found or (versions()["torch"] or "").endswith("+cpu"):
        return Machine(name=f"CPU, {os.cpu_count() or 1} cores", vram=0, ram=free_ram())
    index = int(device.partition(":")[2] or 0)
    chosen = found[min(index, len(found) - 1)]
    return Machine(name=chosen.name, vram=chosen.memory, ram=free_ram())


def refuse_device(device: str, setting: str) -> None:
    """Raise ConfigError for a device that has no such name, or that this machine does not have.

    setting  under which it was given
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ConfigError(f"{setting}={device} is unknown; use auto, cpu, cuda or cuda:N")
    if not device.startswith("cuda"):
        return
    _refuse_absent(device, setting, device, f"use {setting}=cpu or {setting}=auto")


def refuse_devices(numbers: Sequence[int]) -> None:
    """Raise ConfigError for GPUs, as executor.devices names them, that aren't there, or twice."""
    setting, told = "executor.devices", f"[{','.join(map(str, numbers))}]"
    if not numbers or min(numbers) < 0:
        raise ConfigError(
            f"{setting}={told}: use the numbers of GPUs, from 0 on, such as [0,1], or null"
        )
    if len(set(numbers)) < len(numbers):
        raise ConfigError(
            f"{setting}={told} names a GPU twice: name each once, and let several workers share "
            f"them with executor.workers={len(numbers)}"
        )
    advice = f"name GPUs that are there, or leave {setting} out"
    _refuse_absent(told, setting, f"cuda:{max(numbers)}", advice)


def _refuse_absent(told: str, setting: str, device: str, advice: str) -> None:
    """Raise ConfigError if ``cuda`` or ``cuda:N`` isn't there; told: as it was set."""
    torch = versions()["torch"] or ""
    if torch.endswith("+cpu"):
        raise ConfigError(
            f"{setting}={told}, and the torch that is installed ({torch}) is built without CUDA; "
            f"{advice}, or install a build with CUDA"
        )
    if graphics.hidden():
        return  # torch will tell
    found = graphics.visible()
    index = int(device.partition(":")[2] or 0)
    if index >= len(found):
        there = f"{len(found)} GPU{'s' * (len(found) > 1)}" if found else "no usable GPU"
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        within = f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
        raise ConfigError(f"{setting}={told}, but nvidia-smi finds {there} here{within}; {advice}")


def free_ram() -> int:
    """Count the bytes of host memory that are available, within a container's limit."""
    limits = [int(psutil.virtual_memory().available)]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups 2 and 1
        file = Path("/sys/fs/cgroup") / name
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)
