"""What a device can run, and one log line for what it can't."""

import functools
import logging
from importlib.util import find_spec

import torch

log = logging.getLogger(__name__)

OLDEST = 80
"""Oldest compute capability (major * 10 + minor) with the matrix units that the kernels need."""


@functools.lru_cache
def capability(device: torch.device) -> int | None:
    """Return 90 for compute capability 9.0; None if it is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.lru_cache
def processors(device: torch.device) -> int:
    """Count multiprocessors; 2 without a GPU, so that interpreted programs take turns too."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def chained(chip: int | None) -> bool:
    """Tell whether a kernel may be launched while the one before ends (programmatic dependent
    launch): it waits for that one (``gdc_wait``) before it reads or writes."""
    return chip is not None and chip >= 90


@functools.lru_cache
def why_reference(chip: int | None) -> str | None:
    """Say why the kernels can't run on a chip at all; None if they can."""
    if chip is None:
        return "the kernels need an NVIDIA GPU"
    if chip < OLDEST:
        return (
            f"the GPU has compute capability {chip / 10}; the kernels need {OLDEST / 10} or newer"
        )
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    return None


@functools.lru_cache
def say_once(message: str, level: int) -> None:
    """Log a line the first time it is said."""
    log.log(level, message)
