"""The 16-bit model's images of the held-out prompts, which every method is compared with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dirotq.device import choose_dtype, dtype_name, pick_device, refuse_dtype
from dirotq.errors import ConfigError
from dirotq.evaluate.images import ImageWriter, generate_all, typical_seconds
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.units import Units
from dirotq.quantize import memory
from dirotq.quantize.drawing import choose_here, drawn_on
from dirotq.sources.generation import foreign
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import PromptSet


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Images of the model before anything was done to it, and how far they are from themselves.

    Where it makes videos with sound, the sound too.

    ``batch``   prompts per pipeline call; one batch is the unit of resuming
    ``floor``   make every image twice, see :func:`floor_batch` and :func:`other_attention`
    ``dtype``   ``float32``, ``bfloat16``, or ``auto``: what the device computes in

    Writes ``images.zarr`` (dirotq/evaluate/images.py) with ``original`` and, if asked for,
    ``floor`` (the noise floor): the same prompts and noise through other kernels, as another
    machine would run them. No method can be expected to be closer to ``original``.
    """

    version: ClassVar[str] = "2"
    resumable: ClassVar[bool] = True
    needs = memory.reference

    model: DiffusersModel
    prompts: PromptSet
    batch: int
    floor: bool
    dtype: str
    device: str = untracked()

    def __post_init__(self) -> None:
        refuse_dtype(self.dtype)
        if self.batch < 1:
            raise ConfigError(f"reference.batch={self.batch}: use at least 1")

    def check(self) -> None:
        """Refuse, before anything runs, an incomplete model, or an argument it won't take."""
        self.model.check()
        for batch in self.batches.values():
            self.model.check_prompts(self.prompts, batch)

    def run(self, out: Path) -> Mapping[str, float]:
        device = pick_device(self.device)
        dtype = choose_dtype(self.dtype, device)
        prompts, call = self.prompts.load(), self.model.sample_arguments()
        tree = out / "images.zarr"
        way = choose_here(self.model, max(self.batches.values()), dtype, device)
        about = {"device": drawn_on(device, way), "dtype": dtype_name(dtype)}
        units = Units(out, self)
        writers = {
            name: ImageWriter(tree, name, len(prompts), units=units, **about)
            for name in self.batches
        }
        pipe = None
        for name, batch in self.batches.items():
            if not writers[name].missing(batch):
                continue
            pipe = pipe or self.model.pipeline(dtype, device, offloading=way.offloading)
            if name == "floor":
                with foreign(type(pipe).__name__), other_attention(device, dtype):
                    generate_all(writers[name], pipe, prompts, call, batch, "16-bit images again")
            else:
                with foreign(type(pipe).__name__):
                    generate_all(writers[name], pipe, prompts, call, batch, "16-bit images")
        return {
            "images": len(prompts) * len(writers),
            "seconds_per_image": typical_seconds(tree, "original"),
        }

    @property
    def batches(self) -> dict[str, int]:
        """{name of the images: prompts per pipeline call}."""
        again = {"floor": floor_batch(self.batch)} if self.floor else {}
        return {"original": self.batch} | again


def floor_batch(batch: int) -> int:
    """Prompts per call of the second run: half as many, two for one."""
    return batch // 2 if batch > 1 else 2


@contextmanager
def other_attention(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """On CUDA, attention through another kernel than torch would choose.

    In bf16 it would choose flash or cuDNN, in float32 the memory-efficient kernel. A CPU has one.
    """
    if device.type != "cuda":
        yield
        return
    kernels = [SDPBackend.MATH]
    if dtype != torch.float32:
        kernels.append(SDPBackend.EFFICIENT_ATTENTION)
    with sdpa_kernel(kernels):
        yield
