"""Bytes that each stage needs at its peak and leaves on the disk, from shapes alone.

A function per stage, which the stage's ``needs`` calls; pipeline/preflight.py holds them against
the machine. docs/compress.md has them beside what was measured.

Letters: D channels.
"""

from dirotq.errors import ConfigError
from dirotq.pipeline.machine import Machine
from dirotq.pipeline.needs import Needs
from dirotq.pipeline.sizes import parse_bytes
from dirotq.quantize.spectrum import DENSE, MARGIN
from dirotq.quantize.workload import Workload

GPU_RAM = 3.0e9
"""Host memory of a process with torch and a CUDA context: gptq of FLUX.1 on an H200 took 2.9 GB."""
CPU_RAM = 0.9e9
"""The same without a GPU: stages of tiny-flux on an x86 CPU took 0.84 to 0.98 GB."""
GPU_SLACK = 1.35
"""What torch's CUDA allocator reserves over what is in use: capture of FLUX.1 within 24 GB."""
CPU_SLACK = 1.2

SHARDS = 2.25
"""Shards that `pack` holds at its peak: 7.5 GB with FLUX.1's of 2 GB."""
ALIVE = 4.2
"""Activations alive at a block's peak, as a multiple of the input and output of its widest site."""
IMAGE_BYTES = 1.8
"""Bytes of a stored brightness: 16 bits, the higher half of which compresses."""
DECODED = 512
"""Numbers alive in an image decoder, per pixel."""

STATE_SHARE = 0.6
"""Share of the GPU's budget for waiting calls; the rest is a block's and one call's own."""
HOST_SHARE = 0.6
"""Share of free host memory for calls that are parked there."""
FRAGMENTS = 1.15
"""What waiting calls reserve on a GPU over what they hold: their tensors change size on the way."""


def capture(work: Workload, machine: Machine, *, vram: str | int | None, rows: int) -> Needs:
    """Latents of all prompts with the whole network; then the recorded calls block by block.

    vram  the setting ``capture.vram``
    rows  sampled activation rows per site
    """
    limit, weights = budget(machine, vram), machine.width * work.parameters
    streams = machine.gpu and vram is not None and weights > 0.75 * limit
    each, count = _waiting_bytes(work, machine), -(-work.recorded // work.samples)
    room = STATE_SHARE * limit if machine.gpu else HOST_SHARE * machine.ram
    at_once, park = calls_at_once(each, count, room, HOST_SHARE * machine.ram)
    largest = max(work.moment_bytes(site) for site in work.sites)
    block = machine.width * work.block_parameters + work.block_moments + largest
    activations = _activations(work, work.samples, machine.width)
    recording = max(work.encoders, 2 * block if streams else weights + activations)
    waiting = 2 if park else at_once * (FRAGMENTS if machine.gpu else 1)
    replaying = block + activations + waiting * each
    host = float(work.components) + work.call_bytes(work.recorded) + 2 * largest
    host += _block_on_its_way(work)
    host += (at_once * each if park else 0) + (weights if streams else 0)
    adapts = machine.gpu and vram is None  # as yet it takes what is free
    advice = f"capture.vram={0.9 * limit / 1e9:.0f}GB, " if adapts else ""
    return _needs(
        machine,
        max(recording, replaying),
        host,
        disk=work.moments + sum(2 * rows * s.dim for s in work.sites),
        bound=True,
        lower=advice + "capture.batch=1, a smaller model.call.height and width",
    )


def basis(work: Workload, machine: Machine, *, leading: int | None) -> Needs:
    """One site at a time: S as stored and as a square, then its directions in float64."""
    widest, largest = work.widest, max(work.moment_bytes(site) for site in work.block_sites)
    dense = leading is None or widest <= DENSE
    matrices = 8 * 5 * widest**2 if dense else 4 * widest**2 + largest
    thin = 6 * 8 * widest * ((leading or widest) + MARGIN)
    return _needs(
        machine,
        matrices + thin,
        largest,
        disk=sum(4 * s.dim * min(leading or s.dim, s.dim) for s in work.block_sites),
        lower="method.leading=64 (the rank needs no more)",
    )


def low_rank(work: Workload, machine: Machine, *, leading: int | None) -> Needs:
    """One site at a time: its moments and the weights' Gram matrix, all of it in float64."""
    widest = work.widest
    return _needs(
        machine,
        8 * 5 * widest**2 + 16 * widest * min(leading or widest, widest),
        8 * widest**2,
        disk=sum(8 * s.dim * min(leading or s.dim, s.dim) for s in work.block_sites),
        bound=True,
        lower="basis.candidates=5, method.leading=64",
    )


def rank(work: Workload, machine: Machine) -> Needs:
    """One site's spectrum at a time."""
    kept = min(work.method.leading or work.widest, work.widest)
    return _needs(machine, 0, 4 * work.widest * kept, disk=800 * len(work.sites))


def sensitivities(work: Workload, machine: Machine) -> Needs:
    """One block, and a waiting call for each of its sites (dirotq/quantize/sensitivity.py)."""
    each = _waiting_bytes(work, machine)
    room = STATE_SHARE * machine.vram if machine.gpu else HOST_SHARE * machine.ram
    copies = len(work.block_sites) + 1
    at_once, park = calls_at_once(each, copies, room, HOST_SHARE * machine.ram)
    block = 2.0 * machine.width * work.block_parameters + 8 * 3 * _largest_weight(work)
    return _needs(
        machine,
        block + _activations(work, work.samples, machine.width) + each * (2 if park else at_once),
        _block_on_its_way(work) + (at_once * each if park else 0),
        disk=1200 * len(work.sites),
        bound=True,
        lower="rank.sensitivity=equal, capture.batch=1",
    )


def rank_budget(
    work: Workload, machine: Machine, *, measures: bool, prompts: int, batch: int
) -> Needs:
    """The most that its parts need: spectra, sensitivities where it ``measures`` them, and the
    images of ``prompts`` prompts for its A/B check.
    """
    parts = [rank(work, machine)]
    if measures:
        parts.append(sensitivities(work, machine))
    if prompts:
        parts.append(ab_check(work, machine, prompts=prompts, batch=batch))
    return Needs(
        vram=max(part.vram for part in parts),
        ram=max(part.ram for part in parts),
        disk=max(part.disk for part in parts),
        bound=any(part.bound for part in parts),
        lower=", ".join(part.lower for part in parts if part.lower),
    )


def ab_check(work: Workload, machine: Machine, *, prompts: int, batch: int) -> Needs:
    """Images of two plans and of the 16-bit model (dirotq/quantize/ab_check.py)."""
    weights = machine.width * work.parameters + work.components
    peak = _image_peak(work, batch, machine.width)
    return _needs(
        machine,
        weights + peak,
        2 * prompts * 12 * work.pixels,
        disk=1200 * len(work.sites),
        bound=True,
        lower="rank.gate=0 (which leaves the comparison out), rank.batch=1",
    )


def gptq(work: Workload, machine: Machine) -> Needs:
    """One site at a time: S, its rotation and its factor in float64, weights in float32."""
    sizes = ((spec.width, spec.outputs) for _, spec in work.planned)
    return _needs(
        machine,
        max(8 * 4 * wide**2 + 4 * 6 * outputs * wide for wide, outputs in sizes),
        max(work.moment_bytes(site) for site in work.sites),
        disk=work.packed["codes"] + work.packed["scales"],
        lower="method.rounding=nearest (lower quality)",
    )


def fuse(work: Workload, machine: Machine) -> Needs:
    """One block of both networks in float32 with the captured call; a site's halves in float64."""
    block = 2 * 4 * work.block_parameters + 8 * 2 * _largest_weight(work)
    activations = _activations(work, work.samples, 4) + 3 * work.samples * work.state
    return _needs(
        machine,
        block + activations,
        _block_on_its_way(work),
        disk=sum(work.packed[part] for part in ("basis", "protected", "bias")),
        bound=True,
        lower="capture.batch=1, a smaller model.call.height and width",
    )


def pack(work: Workload, machine: Machine, *, shard: int) -> Needs:
    """The packed transformer, ``shard`` bytes at a time, and a copy of all other components."""
    packed = sum(work.packed.values())
    return _needs(
        machine,
        0,
        SHARDS * min(packed, shard),
        disk=packed + work.components,
        bound=True,
        lower="pack.shard=1GB",
    )


def generation(
    work: Workload,
    machine: Machine,
    *,
    batch: int,
    dtype: str,
    lower: str,
    sets: int = 1,
    beside: float = 0,
) -> Needs:
    """The whole pipeline, and ``batch`` of the held-out images at a time.

    dtype   as of dirotq.device.choose_dtype
    sets    how many times all images are made
    beside  further bytes on the disk
    """
    width = {"auto": machine.width, "float32": 4, "bfloat16": 2}[dtype]
    picture = 3 * work.pixels
    return _needs(
        machine,
        width * work.parameters + work.components + _image_peak(work, batch, width),
        batch * picture * (4 + 8 + 2),  # as they came, in the writer's float64, rounded
        disk=sets * work.heldout * picture * IMAGE_BYTES + beside,
        bound=True,
        lower=lower,
    )


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
    machine: Machine,
    device: float,
    host: float = 0,
    *,
    disk: float,
    lower: str = "",
    bound: bool = False,
) -> Needs:
    """Of a process whose peaks are ``device`` bytes where it computes, ``host`` in host memory."""
    if machine.gpu:
        vram, ram = GPU_SLACK * device, GPU_RAM + host
    else:
        vram, ram = 0.0, CPU_RAM + CPU_SLACK * (device + host)
    return Needs(vram=vram, ram=ram, disk=disk, lower=lower, bound=bound)


def _activations(work: Workload, samples: int, width: int) -> float:
    """Bytes alive within a block, ``width`` bytes a number."""
    largest = max(work.tokens(s) * (s.dim + sum(s.rows)) for s in work.block_sites)
    return ALIVE * samples * width * largest


def _image_peak(work: Workload, batch: int, width: int) -> float:
    """Activations of the network or of the decoder, whichever are more."""
    decoding = batch * DECODED * work.pixels * width
    return max(_activations(work, batch * work.guided, width), decoding)


def _waiting_bytes(work: Workload, machine: Machine) -> float:
    """Of one call between two blocks."""
    return work.samples * work.state * machine.width / 2


def _block_on_its_way(work: Workload) -> int:
    """A block's weights as they are read, 16 bits each."""
    return 2 * work.block_parameters


def _largest_weight(work: Workload) -> int:
    """Parameters of the largest site."""
    return max(spec.outputs * spec.dim for _, spec in work.planned)
