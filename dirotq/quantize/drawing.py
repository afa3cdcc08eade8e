"""How the line draws its own images on a GPU that may be too small for a whole pipeline.

Stages choose by the memory that is free, and the preflight (quantize/memory.py) by all there is.
Images stay whole, as tiles would change them; offloading changes none.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from dirotq.device import device_name
from dirotq.quantize.running import WAYS, Running, Way, of_calls
from dirotq.sources.model import DiffusersModel

log = logging.getLogger(__name__)

GPU_SLACK = 1.35
"""What torch's CUDA allocator reserves over what is in use: capture of FLUX.1 within 24 GB."""
WHOLE = tuple(way for way in WAYS if not way.tiled)
WAITING = {"none": "", "model": ", components in host memory", "group": ", layers in host memory"}


def choose(running: Running, vram: float) -> Way:
    """Return the first of :data:`WHOLE` that stays within ``vram`` bytes; the last if none does."""
    return next((way for way in WHOLE if GPU_SLACK * running.needs(way) <= vram), WHOLE[-1])


def choose_here(
    model: DiffusersModel,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    packed: Path | None = None,
    weight: int = 0,
) -> Way:
    """Choose by the memory that is free; a log line says which weights wait.

    batch   prompts of a call
    packed  folder of the packed pipeline, whose largest site has ``weight`` numbers; None: the
            16-bit one, several denoisers of which take turns by themselves
            (dirotq/sources/turns.py)
    """
    if device.type != "cuda" or (packed is None and len(model.parts) > 1):
        return WHOLE[0]
    sites = [site for site in model.sites() if site.kind == "block"]
    wide = max(site.in_features + sum(site.out_features) for site in sites)
    call, width = model.sample_arguments(), dtype.itemsize
    running = of_calls(packed or model.folder(), wide, call, batch=batch, width=width)
    way = choose(with_site(running, weight), torch.cuda.mem_get_info(device)[0])
    if way.offloading != "none":
        log.warning("%s can't hold all weights: %s", device_name(device), way.said)
    return way


def with_site(running: Running, weight: int) -> Running:
    """Add a site of ``weight`` numbers in float32, a few times: where packed weights are unpacked,
    and where the site is compared with the 16-bit one.
    """
    return replace(running, denoising=running.denoising + 16 * weight)


def drawn_on(device: torch.device, way: Way) -> str:
    """Name for the report what draws, and which weights wait, as that takes time."""
    return device_name(device) + WAITING[way.offloading]
