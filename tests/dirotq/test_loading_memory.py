"""What loading takes of host memory, and what a GPU is told to hold."""

import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from tiny_fixtures import *  # noqa: F403
from tiny_line import CALL, CAPTIONS, build_transformer
from tiny_offload import absent
from torch import nn

import dirotq
from dirotq.benchmarks.contestants import planned
from dirotq.errors import ConfigError
from dirotq.models.families import family_of
from dirotq.packed.swap import put_packed
from dirotq.packed.text_quantizer import TextEncoderConfig
from dirotq.quantize.running import CONTEXT, PHASES, Running, of_folder
from dirotq.quantizer import DirotqConfig, mark_packed
from dirotq.sources.opening import open_pipeline, place

SHARD = 4_000_000
NOISE = 6_000_000
"""Bytes that Python and torch take beside tensors, or that another test left to be freed."""


def resident() -> int:
    """Bytes of host memory that this process holds, mapped files among them."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@contextmanager
def watched():
    """The most that host memory grows by, in the list that is yielded."""
    before, peak, done = resident(), [0], threading.Event()

    def look() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], resident() - before)
            time.sleep(0.0005)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        peak[0] = max(peak[0], resident() - before)
        done.set()
        thread.join()


def packed_transformer(folder: Path) -> type:
    made = build_transformer(num_layers=6, num_attention_heads=16)
    specs = planned(family_of(type(made).__name__), made, "dirotq", 16)
    put_packed(made, specs.items())
    for module in made.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and tensor.is_meta:
                module._parameters[name] = nn.Parameter(
                    torch.ones_like(tensor, device="cpu"), requires_grad=False
                )
    mark_packed(made, DirotqConfig.of(specs.items()))
    made.save_pretrained(folder, max_shard_size=SHARD)
    return diffusers.FluxTransformer2DModel


def packed_encoder(folder: Path) -> type:
    config = transformers.T5Config(
        vocab_size=4000, d_model=512, d_ff=2048, num_layers=8, num_heads=8,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    cls = transformers.T5EncoderModel
    cls(config).bfloat16().save_pretrained(folder / "whole")
    packing = TextEncoderConfig(bits=4)
    made = cls.from_pretrained(folder / "whole", quantization_config=packing, dtype=torch.bfloat16)
    made.save_pretrained(folder, max_shard_size=SHARD)
    return cls


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it")
@pytest.mark.parametrize("write", [packed_transformer, packed_encoder])
def test_loading_takes_the_packed_size_and_a_shard(write, tmp_path):
    cls = write(tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert len(files) > 3 and size > 3 * (SHARD + NOISE) / 2
    cls.from_pretrained(tmp_path, dtype=torch.bfloat16)  # imports, caches
    with watched() as peak:
        made = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
        for tensor in made.parameters():
            tensor.flatten().view(torch.uint8)[::4096].sum()  # what is mapped is read
    assert 0.5 * size < peak[0] <= size + SHARD + NOISE, (size, peak)
