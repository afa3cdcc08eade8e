"""What a stage will take, and what a machine can do: the two sides of an estimate.

Plain numbers, no torch: stages fill in a :class:`Cost` from shapes, ``pipeline/machine.py`` a
:class:`Machine` from what is installed.
"""

from dataclasses import dataclass
from typing import TypedDict

from dirotq.errors import ConfigError
from dirotq.pipeline.sizes import parse_bytes

__all__ = ["Cost", "Machine", "budget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """One run of one stage: seconds, and bytes at the peak (``disk``: what it leaves behind).

    ``lower``  settings that would lower its memory, for the message that refuses it
    """

    seconds: float
    vram: float = 0.0
    ram: float = 0.0
    disk: float = 0.0
    lower: str = ""


class Memory(TypedDict):
    """The two memories of a :class:`Cost`."""

    vram: float
    ram: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine as effective rates: what the line's own work reaches on it, not what is printed on
    the box. FLOPs count a multiplication and an addition as two; rates are per second.
    """

    name: str
    gpu: bool
    vram: int
    """Bytes of GPU memory; 0 without a GPU."""
    ram: int
    """Bytes of host memory that can be had."""

    network: float
    """FLOPs of a denoiser's forward in its compute dtype, for very wide layers."""
    network_half: float
    """Channels at which that rate is half reached."""
    moments: float
    """FLOPs of XᵀX (2 T D², though only a triangle is computed), for very many channels."""
    moments_half: float
    float32: float
    """FLOPs of float32 products."""
    float64: float
    """FLOPs of float64 products."""
    eigh: float
    """FLOPs of a float64 eigendecomposition, 9 D³ of them."""

    load: float
    """Bytes of 16-bit weights from disk to where they compute."""
    read: float
    """Bytes of artifacts, hashed and read."""
    write: float
    """Bytes of artifacts, written, hashed and forced to the disk."""
    park: float
    """Bytes between a GPU and page-locked host memory."""

    start: float
    """Seconds until a stage's first product: imports, components, contexts, first kernels."""
    site: float
    """Seconds of bookkeeping per site and pass."""
    block: float
    """Least seconds of one block in a forward: its kernel launches."""
    column: float
    """Seconds per column of a GPTQ sweep."""
    factor: float
    """Seconds of a small factorization (a few hundred rows)."""

    base_ram: float
    """Bytes of a process that has loaded everything and computes nothing."""
    slack: float
    """What the allocator reserves, as a multiple of what is in use at the peak."""

    def memory(self, device: float, host: float = 0.0) -> "Memory":
        """``vram`` and ``ram`` of a process that has so many bytes in use at its peaks."""
        if self.gpu:
            return {"vram": self.slack * device, "ram": self.base_ram + host}
        return {"vram": 0.0, "ram": self.base_ram + self.slack * (device + host)}

    @property
    def width(self) -> int:
        """Bytes of a number of the denoiser's compute dtype."""
        return 2 if self.gpu else 4

    def forward_seconds(self, flops: float, channels: int, blocks: int) -> float:
        """One forward of a denoiser of so many channels and blocks."""
        return max(flops / _rate(self.network, channels, self.network_half), blocks * self.block)

    def moment_seconds(self, tokens: float, channels: int) -> float:
        """XᵀX of so many tokens."""
        return 2 * tokens * channels**2 / _rate(self.moments, channels, self.moments_half)


def budget(machine: Machine, vram: str | int | None) -> int:
    """Bytes of GPU memory to stay within: the setting ``vram`` ("24GB"), or all there is.

    Raises ConfigError for a setting above what the GPU has.
    """
    wanted = machine.vram if vram is None else parse_bytes(vram)
    if machine.gpu and wanted > machine.vram:
        raise ConfigError(
            f"capture.vram={vram} is more than {machine.name} has ({machine.vram / 1e9:.1f} GB): "
            "give less, or null for what is free"
        )
    return wanted


def _rate(peak: float, channels: int, half: float) -> float:
    return peak * channels / (channels + half)
