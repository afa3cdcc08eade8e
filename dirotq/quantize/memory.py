"""Bytes that each stage needs at its peak and leaves on the disk, from shapes alone.

A function per stage, which is the stage's ``needs``; pipeline/preflight.py holds them against the
machine. docs/compress.md has them beside what was measured.
"""

from collections import defaultdict
from dataclasses import replace
from typing import Any

from dirotq.calibrate.adjoint import ROOM
from dirotq.calibrate.replay import HOST_SHARE, STATE_SHARE, calls_at_once
from dirotq.calibrate.text_codes import WIDEST
from dirotq.calibrate.trajectory import FITS
from dirotq.errors import ConfigError
from dirotq.kernels.formats.quantize_weight import CHUNK
from dirotq.models.call import PROBES
from dirotq.pipeline.machine import Machine, Needs
from dirotq.pipeline.sizes import parse_bytes
from dirotq.quantize.arithmetic import generating, measuring, proving, replaying
from dirotq.quantize.drawing import GPU_SLACK, choose, with_site
from dirotq.quantize.expected import activations, decoded, original, packed
from dirotq.quantize.running import Running
from dirotq.quantize.sensitive import parse_sensitive
from dirotq.quantize.spectrum import DENSE, MARGIN
from dirotq.quantize.uncalibrated import part_of
from dirotq.quantize.workload import Workload
from dirotq.sources.opening import SHARE

GPU_RAM = 3.75e9
"""Host memory of a process with torch and a CUDA context, pages of files that are read among it. On
an H200 stages of FLUX.1 took 3.6 to 4.3 GB in all, of Wan 2.2 up to 4.5."""
CPU_RAM = 0.9e9
"""The same without a GPU: stages of tiny-flux on an x86 CPU took 0.84 to 0.98 GB."""
CPU_SLACK = 1.2
"""The same of host memory: with it no stage of tiny-flux on that CPU took more than its bound."""
SHARDS = 2.25
"""Shards that `pack` holds at its peak: 7.5 GB with FLUX.1's of 2 GB."""
ROUNDING = 1.5e9
"""A text encoder's weight while it is rounded: the weight in float32, and six tensors of a part."""
GRAPH = 5
"""Numbers that a block's graph and its gradients keep for each that its linears read and write."""
IMAGE_BYTES = 1.8
"""Bytes of a stored brightness: 16 bits, the higher half of which compresses."""
SEARCHED = 8 * 4 * CHUNK
"""What the search for scales holds beside them: float32 tensors of a chunk of weights."""
FRAGMENTS = 1.15
"""What waiting calls reserve on a GPU over what they hold: their tensors change size on the way."""


def capture(stage: Any, work: Workload, machine: Machine) -> Needs:
    """Latents of all prompts with the whole network; then the recorded calls block by block."""
    limit, largest = budget(machine, stage.vram), machine.width * work.largest_denoiser
    streams = machine.gpu and stage.vram is not None and largest > FITS * limit
    share = FITS if machine.gpu and stage.vram is not None else SHARE
    weights = _denoisers(work, machine.width, share * (limit if machine.gpu else machine.ram))
    moments = {site.name: work.moment_bytes(site) for site in work.sites}
    of_site = max(moments.values())
    of_block = max(sum(moments[s.name] for s in sites) for sites in work.by_block.values())
    waiting, parked = _waiting(work, machine, -(-work.recorded // work.samples), limit)
    # One block's sums are stored, and another's weights read, while calls pass a block.
    block = 2 * (machine.width * work.block_parameters + of_block) + of_site
    streamed = 2 * (machine.width * work.block_parameters + of_block + of_site)
    alive = activations(work, work.samples, machine.width)
    encoders = sum(
        size for name, size in work.components.items() if name.startswith("text_encoder")
    )
    recording = max(encoders, streamed if streams else weights + alive)
    passing = block + alive + waiting * (FRAGMENTS if machine.gpu and not parked else 1)
    # An upper bound of the recorded calls, as a prompt's steps share its text.
    calls = work.recorded * work.argument_bytes
    host = _components(work, machine.width) + calls + 2 * of_site + _block_read(work) + parked
    host += largest if streams else 0
    disk = sum(moments.values()) + sum(2 * stage.rows * site.in_features for site in work.sites)
    adapts = machine.gpu and stage.vram is None  # as yet it takes what is free
    lower = f"capture.vram={0.9 * limit / 1e9:.0f}GB, " if adapts else ""
    lower += "capture.batch=1, a smaller model.sample.height and width"
    needs = _needs(machine, max(recording, passing), host, disk, lower, bound=True)
    forwards = {"record": generating(work, work.calibration), "replay": replaying(work)}
    return replace(needs, forwards=forwards)


def basis(stage: Any, work: Workload, machine: Machine) -> Needs:
    """One site at a time: S as stored and as a square, then its directions in float64. The next
    one's S and weights are read meanwhile.

    Principal ones of few channels take a full eigendecomposition. Those that count the weights take
    none, but these twice in float32, their Gram matrix where that is smaller, and as many
    directions again while they work.
    """
    widest, stored = work.widest, max(map(work.moment_bytes, work.block_sites))
    product = stage.directions == "product"
    dense = not product and (stage.leading is None or widest <= DENSE)
    matrices = 8 * 5 * widest**2 if dense else 4 * widest**2 + stored
    thin, reading = 6 * 8 * widest * ((stage.leading or widest) + MARGIN), stored
    if product:
        inside = [(s, s.in_features, sum(s.out_features)) for s in work.block_sites]
        square = max(4 * (d * d + 2 * n * d + (d * d if n >= d else 0)) for _, d, n in inside)
        matrices, thin = square + stored, 2 * thin
        reading = max(work.moment_bytes(site) + 4 * n * d for site, d, n in inside)
    lower = "method.leading=64 (the rank needs no more)"
    disk = 4 * _directions(work, stage.leading)
    return _needs(machine, matrices + thin + reading, stored, disk, lower)


def low_rank(stage: Any, work: Workload, machine: Machine) -> Needs:
    """One site at a time: its moments and the weights' Gram matrix, all of it in float64."""
    square, thin = work.widest**2, work.widest * min(stage.leading or work.widest, work.widest)
    lower = "basis.candidates=5, method.leading=64"
    disk = 8 * _directions(work, stage.leading)
    return _needs(machine, 40 * square + 16 * thin, 8 * square, disk, lower, bound=True)


def rank(stage: Any, work: Workload, machine: Machine) -> Needs:
    """One site's spectrum at a time, or what measuring sensitive sites takes."""
    asked = parse_sensitive(stage.sensitive, stage.method.activations.bits)
    return _sensitivities(work, machine) if asked else _spectra(work, machine)


def rank_budget(stage: Any, work: Workload, machine: Machine) -> Needs:
    """Take the most of spectra, sensitivities and the A/B check's images (quantize/measure.py)."""
    parts = [_spectra(work, machine), _sensitivities(work, machine)]
    forwards = dict(parts[1].forwards)
    if stage.gate:
        images = _image_peak(work, stage.batch, machine.width)
        device = _original(work, machine.width, machine) + images
        host, disk = 24 * stage.gate * work.pixels, 1200 * len(work.sites)
        lower = "rank.gate=0 (which leaves the comparison out), rank.batch=1"
        parts.append(_needs(machine, device, host, disk, lower, bound=True))
        forwards["rank's images"] = generating(work, 3 * stage.gate)  # 16-bit ones, and two plans'
    vram, ram, disk = (max(getattr(p, what) for p in parts) for what in ("vram", "ram", "disk"))
    lower = ", ".join(part.lower for part in parts if part.lower)
    return Needs(vram=vram, ram=ram, disk=disk, bound=True, lower=lower, forwards=forwards)


def gptq(stage: Any, work: Workload, machine: Machine) -> Needs:
    """One site at a time: S, its rotation and its factor in float64, weights in float32. What the
    next one is made from is read meanwhile.
    """
    sizes = ((spec.width, spec.outputs) for _, spec in work.planned)
    device = max(8 * 4 * wide**2 + 4 * 6 * outputs * wide for wide, outputs in sizes)
    host = max(map(work.moment_bytes, work.sites))
    device += host + 4 * work.largest_weight
    disk = work.packed["codes"] + work.packed["scales"]
    return _needs(machine, device, host, disk, "method.rounding=nearest (lower quality)")


def rounding(stage: Any, work: Workload, machine: Machine) -> Needs:
    """One site: weights as read and transformed in float32, and GPTQ of one of its parts; on a GPU
    the next site's are read meanwhile.
    """
    sizes = ((s.outputs, s.width, part_of(s.width, s.weight_group_size)) for _, s in work.planned)
    device = SEARCHED + max(11 * n * k + 4 * 5 * n * part + 8 * 4 * part**2 for n, k, part in sizes)
    disk = sum(size for part, size in work.packed.items() if part != "kept")
    device += 4 * work.largest_weight if machine.gpu else 0
    host = 4 * work.largest_weight if machine.gpu else 0
    return _needs(
        machine, device, host, disk, "method.rounding=nearest (lower quality)", bound=True
    )


def fuse(stage: Any, work: Workload, machine: Machine) -> Needs:
    """Hold a block of both networks and the next one in float32, with a call; a site in float64."""
    device = 3.0 * 4 * work.block_parameters + 8 * 2 * work.largest_weight
    device += activations(work, work.samples, 4) + 3 * work.samples * work.state
    disk = sum(work.packed[part] for part in ("basis", "protected", "bias"))
    lower = "capture.batch=1, a smaller model.sample.height and width"
    needs = _needs(machine, device, _block_read(work), disk, lower, bound=True)
    return replace(needs, forwards={"fuse's proof": proving(work)})


def pack(stage: Any, work: Workload, machine: Machine) -> Needs:
    """Write the packed transformer, a shard at a time, and copy or pack the other components."""
    size = sum(work.packed.values())
    host, disk = (
        SHARDS * min(size, parse_bytes(stage.shard, "pack.shard")),
        size + sum(work.components.values()),
    )
    if work.encoders:  # one at a time, whole; its largest weight in float32 while it is rounded
        host = max(host, max(work.encoders.values()) + ROUNDING)
        disk += sum(work.encoders.values()) - sum(work.components.get(n, 0) for n in work.encoders)
    device, lower = 0.0, "pack.shard=1GB"
    four = {n: c for n, c in work.encoder_choices.items() if c.bits == 4}
    if four and stage.prompts is not None:
        # All of the pipeline's encoders, and one linear's second moment with its factors; GPUs
        # that don't hold an encoder get it layer by layer.
        widths = (k for choice in four.values() for k in choice.linears.values() if k <= WIDEST)
        factors = (2 * 4 + 8 * 3) * max(widths, default=0) ** 2
        encoders = machine.width / 2 * sum(work.components.get(n, 0) for n in four)
        device = (0 if machine.gpu else encoders) + factors
        host = max(host, _components(work, 2) + sum(work.encoders.values()))
        lower = "text_encoders=w8 (which calibrates nothing), pack.shard=1GB"
    return _needs(machine, device, host, disk, lower, bound=True)


def reference(stage: Any, work: Workload, machine: Machine) -> Needs:
    """Draw with the 16-bit pipeline."""
    batches = stage.batches.values()
    drawing = _draw_original(work, machine, stage, max(batches))
    needs = _generation(work, machine, stage, drawing, max(batches), len(batches), 0)
    return replace(needs, forwards={"reference": generating(work, len(batches) * work.heldout)})


def validate(stage: Any, work: Workload, machine: Machine) -> Needs:
    """Draw with the packed pipeline; with packed text encoders, then with the 16-bit one."""
    running = packed(work, stage.batch, _width(stage.dtype, machine))
    drawing = _draw(with_site(running, work.largest_weight), machine)
    if work.encoders:
        first, second = drawing, _draw_original(work, machine, stage, stage.batch)
        drawing = max(first[0], second[0]), max(first[1], second[1])
    if machine.gpu:  # sites are measured on their way from there
        drawing = drawing[0], max(drawing[1], float(sum(work.packed.values())))
    beside = stage.pairs * 6 * work.pixels + 1500 * len(work.planned)
    sets = 2 if work.encoders else 1  # with the encoders alone packed
    needs = _generation(work, machine, stage, drawing, stage.batch, sets, beside)
    return replace(needs, forwards={"validate": generating(work, sets * work.heldout)})


def budget(machine: Machine, vram: str | int | None) -> int:
    """Bytes of GPU memory to stay within: the setting ``vram`` ("24GB"), or all there is.

    Raises ConfigError for a setting above what the GPU has.
    """
    wanted = machine.vram if vram is None else parse_bytes(vram, "capture.vram")
    if machine.gpu and wanted > machine.vram:
        raise ConfigError(
            f"capture.vram={vram} is more than {machine.name} has ({machine.vram / 1e9:.1f} GB): "
            "give less, or null for what is free"
        )
    return wanted


def _spectra(work: Workload, machine: Machine) -> Needs:
    kept = min(work.method.leading or work.widest, work.widest)
    return _needs(machine, 0, 4 * work.widest * kept, 800 * len(work.sites))


def _sensitivities(work: Workload, machine: Machine) -> Needs:
    """One block with its graph, and what calls gave to all blocks (dirotq/quantize/measure.py)."""
    inside = defaultdict(list)
    for site in work.block_sites:
        inside[site.block].append(work.tokens(site) * (site.in_features + sum(site.out_features)))
    samples, width = work.samples, machine.width
    graph = GRAPH * samples * width * max(map(sum, inside.values()))
    waiting, parked = _waiting(work, machine, ROOM * PROBES * len(inside), machine.vram)
    block = 3 * width * work.block_parameters + 8 * 3 * work.largest_weight
    device, host = block + graph + waiting / ROOM, _block_read(work) + parked / ROOM
    needs = _needs(machine, device, host, 1200 * len(work.sites), "capture.batch=1", bound=True)
    return replace(needs, forwards={"sensitive sites": measuring(work)})


def _generation(
    work: Workload,
    machine: Machine,
    stage: Any,
    drawing: tuple[float, float],
    batch: int,
    sets: int,
    beside: float,
) -> Needs:
    """Draw and write ``batch`` of the held-out images at a time.

    drawing  bytes that it takes where it computes, and of weights that wait in host memory
    sets     how many times all images are made;  beside  further bytes on the disk
    """
    (device, host), picture = drawing, 3 * work.pixels
    host += batch * picture * (4 + 8 + 2)  # as they came, in the writer's float64, rounded
    disk = sets * work.heldout * picture * IMAGE_BYTES + beside
    lower = (
        f"{type(stage).__name__.lower()}.batch=1, a smaller model.sample.height and width, "
        "until=pack (which leaves it out)"
    )
    return _needs(machine, device, host, disk, lower, bound=True)


def _draw(running: Running, machine: Machine) -> tuple[float, float]:
    """Bytes of a pipeline that draws, where it computes and of weights that wait in host memory, in
    the way that the stage will choose (quantize/drawing.py).
    """
    weights = sum(running.weights.values())
    if not machine.gpu:
        return weights + max(running.denoising, running.decoding), 0.0
    way = choose(running, machine.vram)
    return running.needs(way), 0.0 if way.offloading == "none" else weights


def _draw_original(work: Workload, machine: Machine, stage: Any, batch: int) -> tuple[float, float]:
    """Return the same of the 16-bit pipeline, several denoisers of which take turns by themselves
    (dirotq/sources/turns.py).
    """
    width = _width(stage.dtype, machine)
    if len(work.model.parts) > 1:
        return _original(work, width, machine) + _image_peak(work, batch, width), 0.0
    return _draw(original(work, batch, width), machine)


def _width(dtype: str, machine: Machine) -> int:
    """Bytes of a number; ``dtype`` as of dirotq.device.choose_dtype."""
    return {"auto": machine.width, "float32": 4, "bfloat16": 2}[dtype]


def _original(work: Workload, width: int, machine: Machine) -> float:
    """Bytes of the 16-bit pipeline's weights while it makes images."""
    room = SHARE * (machine.vram if machine.gpu else machine.ram)
    components = _components(work, width)
    return components + _denoisers(work, width, room - (components if machine.gpu else 0))


def _needs(
    machine: Machine, device: float, host: float, disk: float, lower: str = "", bound: bool = False
) -> Needs:
    """Of a process whose peaks are ``device`` bytes where it computes, ``host`` in host memory."""
    if machine.gpu:
        vram, ram = GPU_SLACK * device, GPU_RAM + host
    else:
        vram, ram = 0.0, CPU_RAM + CPU_SLACK * (device + host)
    return Needs(vram=vram, ram=ram, disk=disk, lower=lower, bound=bound)


def _denoisers(work: Workload, width: int, room: float) -> float:
    """Bytes of all denoisers, or of one where there is no room and they take turns."""
    every = width * work.parameters
    return every if every <= room else width * work.largest_denoiser


def _waiting(work: Workload, machine: Machine, count: int, limit: int) -> tuple[float, float]:
    """Bytes of ``count`` calls between two blocks: where it computes, and parked in host memory."""
    each, host = work.samples * work.state * machine.width / 2, HOST_SHARE * machine.ram
    room = STATE_SHARE * limit if machine.gpu else host
    at_once, park = calls_at_once(each, count, room, host)
    return (2 * each, at_once * each) if park else (at_once * each, 0)


def _image_peak(work: Workload, batch: int, width: int) -> float:
    """Activations of the network or of the decoder, whichever are more."""
    return max(activations(work, batch * work.doubled, width), decoded(work, batch, width))


def _block_read(work: Workload) -> int:
    """Return a block's weights as they pass through host memory, 2 bytes each."""
    return 2 * work.block_parameters


def _components(work: Workload, width: int) -> int:
    """Bytes in memory of the pipeline's other weights, ``width`` bytes a number."""
    return width * sum(work.component_numbers.values())


def _directions(work: Workload, leading: int | None) -> int:
    """Numbers of all sites' directions, ``leading`` of them (None: all) kept for each."""
    return sum(
        s.in_features * min(leading or s.in_features, s.in_features) for s in work.block_sites
    )
