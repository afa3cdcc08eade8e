"""Bytes that each stage needs at its peak and leaves on the disk, from shapes alone.

A function per stage, which the stage's ``needs`` calls; pipeline/preflight.py holds them against
the machine. docs/compress.md has them beside what was measured.
"""

from dirotq.errors import ConfigError
from dirotq.pipeline.machine import Machine, Needs
from dirotq.pipeline.sizes import parse_bytes
from dirotq.quantize.spectrum import DENSE, MARGIN
from dirotq.quantize.workload import Workload

__all__ = [
    "HOST_SHARE", "STATE_SHARE", "Machine", "Needs", "Workload", "basis", "budget",
    "calls_at_once", "capture", "fuse", "generation", "gptq", "low_rank", "pack", "rank",
    "rank_budget", "sensitivities",
]  # fmt: skip

GPU_RAM = 3.0e9
"""Host memory of a process with torch and a CUDA context: gptq of FLUX.1 on an H200 took 2.9 GB."""
CPU_RAM = 0.9e9
"""The same without a GPU: stages of tiny-flux on an x86 CPU took 0.84 to 0.98 GB."""
GPU_SLACK = 1.35
"""What torch's CUDA allocator reserves over what is in use: capture of FLUX.1 within 24 GB."""
CPU_SLACK = 1.2
"""The same of host memory: with it no stage of tiny-flux on that CPU took more than its bound."""
SHARDS = 2.25
"""Shards that `pack` holds at its peak: 7.5 GB with FLUX.1's of 2 GB."""
ALIVE = 4.2
"""Activations alive at a block's peak, as a multiple of the input and output of its widest site."""
DECODED = 512
"""Numbers alive in an image decoder, per pixel."""
IMAGE_BYTES = 1.8
"""Bytes of a stored brightness: 16 bits, the higher half of which compresses."""

STATE_SHARE = 0.6
"""Share of the GPU's budget for waiting calls; the rest is a block's and one call's own."""
HOST_SHARE = 0.6
"""Share of free host memory for calls that are parked there."""
FRAGMENTS = 1.15
"""What waiting calls reserve on a GPU over what they hold: their tensors change size on the way."""


def capture(work: Workload, machine: Machine, vram: str | int | None, rows: int) -> Needs:
    """Latents of all prompts with the whole network; then the recorded calls block by block.

    vram  the setting ``capture.vram``;  rows  sampled activation rows per site
    """
    limit, weights = budget(machine, vram), machine.width * work.parameters
    streams = machine.gpu and vram is not None and weights > 0.75 * limit
    count, largest = -(-work.recorded // work.samples), max(map(work.moment_bytes, work.sites))
    waiting, parked = _waiting(work, machine, count, limit)
    block = machine.width * work.block_parameters + work.block_moments + largest
    alive = _activations(work, work.samples, machine.width)
    recording = max(work.encoders, 2 * block if streams else weights + alive)
    replaying = block + alive + waiting * (FRAGMENTS if machine.gpu and not parked else 1)
    host = work.components + work.call_bytes + 2 * largest + _block_read(work) + parked
    disk = work.moments + sum(2 * rows * site.in_features for site in work.sites)
    adapts = machine.gpu and vram is None  # as yet it takes what is free
    lower = f"capture.vram={0.9 * limit / 1e9:.0f}GB, " if adapts else ""
    lower += "capture.batch=1, a smaller model.call.height and width"
    host += weights if streams else 0
    return _needs(machine, max(recording, replaying), host, disk, lower, bound=True)


def basis(work: Workload, machine: Machine, leading: int | None) -> Needs:
    """One site at a time: S as stored and as a square, then its directions in float64."""
    widest, stored = work.widest, max(map(work.moment_bytes, work.block_sites))
    dense = leading is None or widest <= DENSE
    matrices = 8 * 5 * widest**2 if dense else 4 * widest**2 + stored
    thin = 6 * 8 * widest * ((leading or widest) + MARGIN)
    lower = "method.leading=64 (the rank needs no more)"
    return _needs(machine, matrices + thin, stored, 4 * work.directions(leading), lower)


def low_rank(work: Workload, machine: Machine, leading: int | None) -> Needs:
    """One site at a time: its moments and the weights' Gram matrix, all of it in float64."""
    square, thin = work.widest**2, work.widest * min(leading or work.widest, work.widest)
    lower = "basis.candidates=5, method.leading=64"
    disk = 8 * work.directions(leading)
    return _needs(machine, 40 * square + 16 * thin, 8 * square, disk, lower, bound=True)


def rank(work: Workload, machine: Machine) -> Needs:
    """One site's spectrum at a time."""
    kept = min(work.method.leading or work.widest, work.widest)
    return _needs(machine, 0, 4 * work.widest * kept, 800 * len(work.sites))


def sensitivities(work: Workload, machine: Machine) -> Needs:
    """One block, and a waiting call for each of its sites (dirotq/quantize/sensitivity.py)."""
    waiting, parked = _waiting(work, machine, len(work.block_sites) + 1, machine.vram)
    block = 2 * machine.width * work.block_parameters + 8 * 3 * work.largest_weight
    device = block + _activations(work, work.samples, machine.width) + waiting
    lower = "rank.sensitivity=equal, capture.batch=1"
    host, disk = _block_read(work) + parked, 1200 * len(work.sites)
    return _needs(machine, device, host, disk, lower, bound=True)


def rank_budget(
    work: Workload, machine: Machine, measures: bool, prompts: int, batch: int
) -> Needs:
    """The most that its parts need: spectra, sensitivities where it ``measures`` them, and the
    images of ``prompts`` prompts for its A/B check (dirotq/quantize/ab_check.py).
    """
    parts = [rank(work, machine)]
    if measures:
        parts.append(sensitivities(work, machine))
    if prompts:
        weights = machine.width * work.parameters + work.components
        device, host = weights + _image_peak(work, batch, machine.width), 24 * prompts * work.pixels
        lower = "rank.gate=0 (which leaves the comparison out), rank.batch=1"
        parts.append(_needs(machine, device, host, 1200 * len(work.sites), lower, bound=True))
    return Needs(
        vram=max(part.vram for part in parts),
        ram=max(part.ram for part in parts),
        disk=max(part.disk for part in parts),
        bound=any(part.bound for part in parts),
        lower=", ".join(part.lower for part in parts if part.lower),
    )


def gptq(work: Workload, machine: Machine) -> Needs:
    """One site at a time: S, its rotation and its factor in float64, weights in float32."""
    sizes = ((spec.width, spec.outputs) for _, spec in work.planned)
    device = max(8 * 4 * wide**2 + 4 * 6 * outputs * wide for wide, outputs in sizes)
    host = max(map(work.moment_bytes, work.sites))
    disk = work.packed["codes"] + work.packed["scales"]
    return _needs(machine, device, host, disk, "method.rounding=nearest (lower quality)")


def fuse(work: Workload, machine: Machine) -> Needs:
    """One block of both networks in float32 with the captured call; a site's halves in float64."""
    device = 2.0 * 4 * work.block_parameters + 8 * 2 * work.largest_weight
    device += _activations(work, work.samples, 4) + 3 * work.samples * work.state
    disk = sum(work.packed[part] for part in ("basis", "protected", "bias"))
    lower = "capture.batch=1, a smaller model.call.height and width"
    return _needs(machine, device, _block_read(work), disk, lower, bound=True)


def pack(work: Workload, machine: Machine, shard: int) -> Needs:
    """The packed transformer, ``shard`` bytes at a time, and a copy of all other components."""
    packed = sum(work.packed.values())
    host, disk = SHARDS * min(packed, shard), packed + work.components
    return _needs(machine, 0, host, disk, "pack.shard=1GB", bound=True)


def generation(
    work: Workload, machine: Machine, stage: str, batch: int, dtype: str, beside: int, sets: int = 1
) -> Needs:
    """The whole pipeline, and ``batch`` of the held-out images at a time.

    stage   whose settings they are;  dtype  as of dirotq.device.choose_dtype
    beside  further bytes on the disk;  sets  how many times all images are made
    """
    width = {"auto": machine.width, "float32": 4, "bfloat16": 2}[dtype]
    device = width * work.parameters + work.components + _image_peak(work, batch, width)
    picture = 3 * work.pixels
    host = batch * picture * (4 + 8 + 2)  # as they came, in the writer's float64, rounded
    disk = sets * work.heldout * picture * IMAGE_BYTES + beside
    lower = f"{stage}.batch=1, until=pack (which leaves it out)"
    return _needs(machine, device, host, disk, lower, bound=True)


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


def calls_at_once(each: float, count: int, room: float, host: float) -> tuple[int, bool]:
    """How many calls to keep on their way at a time, and whether to park them in host memory.

    each, count  bytes of one waiting call, and how many calls there are
    room, host   bytes of GPU memory and of host memory that they may take
    """
    if each * count <= room:
        return count, False
    return max(1, min(count, int(host // max(each, 1)))), True


def _needs(
    machine: Machine, device: float, host: float, disk: float, lower: str = "", bound: bool = False
) -> Needs:
    """Of a process whose peaks are ``device`` bytes where it computes, ``host`` in host memory."""
    if machine.gpu:
        vram, ram = GPU_SLACK * device, GPU_RAM + host
    else:
        vram, ram = 0.0, CPU_RAM + CPU_SLACK * (device + host)
    return Needs(vram=vram, ram=ram, disk=disk, lower=lower, bound=bound)


def _waiting(work: Workload, machine: Machine, count: int, limit: int) -> tuple[float, float]:
    """Bytes of ``count`` calls between two blocks: where it computes, and parked in host memory."""
    each, host = work.samples * work.state * machine.width / 2, HOST_SHARE * machine.ram
    room = STATE_SHARE * limit if machine.gpu else host
    at_once, park = calls_at_once(each, count, room, host)
    return (2 * each, at_once * each) if park else (at_once * each, 0)


def _activations(work: Workload, samples: int, width: int) -> float:
    """Bytes alive within a block, ``width`` bytes a number."""
    largest = max(work.tokens(s) * (s.in_features + sum(s.out_features)) for s in work.block_sites)
    return ALIVE * samples * width * largest


def _image_peak(work: Workload, batch: int, width: int) -> float:
    """Activations of the network or of the decoder, whichever are more."""
    decoding = batch * DECODED * work.pixels * width
    return max(_activations(work, batch * work.guided, width), decoding)


def _block_read(work: Workload) -> int:
    """A block's weights as they pass through host memory, 16 bits each."""
    return 2 * work.block_parameters
