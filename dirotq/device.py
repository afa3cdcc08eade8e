"""Where and in which precision a stage computes."""

import ctypes
import gc
import os
import re

import torch

from dirotq.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16")
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables of torch's allocator; the second name is the newer one."""


def pick_device(name: str) -> torch.device:
    """Return the device ``auto`` (a GPU when there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises ConfigError for any other name, and for a CUDA device on a machine without one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"device={name} is unknown; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device={name}, but torch {torch.__version__} finds no CUDA device here; "
            "use device=cpu or device=auto"
        )
    return device


def compute_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on a GPU, float32 on a CPU (where bf16 products are several times slower)."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return ``float32`` or ``bfloat16``; for ``auto``, what :func:`compute_dtype` returns.

    Raises ConfigError for any other name.
    """
    refuse_dtype(name)
    return compute_dtype(device) if name == "auto" else getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as settings do."""
    return str(dtype).removeprefix("torch.")


def refuse_dtype(name: str) -> None:
    """Raise ConfigError unless :func:`choose_dtype` knows the name."""
    if name not in DTYPES:
        raise ConfigError(f"dtype={name} is unknown; use {', '.join(DTYPES)}")


def release(device: torch.device) -> None:
    """Free what nobody names any more, a pipeline that was called among it.

    diffusers' hooks know their modules, which know their hooks: only the collector frees them.
    """
    gc.collect()
    give_back(device)


def give_back(device: torch.device) -> None:
    """Give memory that is free in this process back to the device and to the system.

    glibc keeps what tensors below 32 MB leave, and lays the next ones into new memory where they
    fit into none of it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc alone
        trim(ctypes.c_size_t(0))


def refuse_vram(vram: str | int, device: torch.device, setting: str) -> None:
    """Raise ConfigError for a limit of GPU memory where nothing computes on a GPU.

    setting  under which it was given
    """
    if device.type != "cuda":
        raise ConfigError(
            f"{setting}={vram} is about a GPU's memory, and device={device} has none: leave it "
            "out, or give device=cuda"
        )


def device_name(device: torch.device) -> str:
    """Name the card, or the CPU, for people."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def expandable_segments() -> bool:
    """Let torch's CUDA allocator grow its segments, unless the environment says how it works.

    Otherwise torch holds on to the memory of tensors that shrink or grow from phase to phase.
    Returns False where it is too late: torch reads the variable when CUDA is first used.
    """
    if any(name in os.environ for name in ALLOCATOR):
        return True
    if torch.cuda.is_initialized():
        return False
    os.environ[ALLOCATOR[0]] = "expandable_segments:True"
    return True
