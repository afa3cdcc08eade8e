"""LoRAs and finetunes of the tiny pipeline, and what becomes of its weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dirotq.sources.hub
from dirotq.sources.model import DiffusersModel

__all__ = ["cache", "finetune", "lora"]

Q = "transformer_blocks.0.attn.to_q"
PROJ = "single_transformer_blocks.0.proj_mlp"


def model(path: Path | str, **fields) -> DiffusersModel:
    return DiffusersModel(path=str(path), call={}, **fields)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a pipeline's transformer."""
    found = {}
    for file in (folder / "transformer").glob("*.safetensors"):
        found |= load_file(file)
    return found


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """DiRotQ's cache folder of this test."""
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    dirotq.sources.hub._commit.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def lora(tmp_path: Path, folder: Path) -> Callable[..., Path]:
    """``lora(template)``: a file with rank-4 updates of two linears, keys by the template."""
    shapes = {m: tensors_of(folder)[f"{m}.weight"].shape for m in (Q, PROJ)}

    def write(down="transformer.{}.lora_A.weight", up="transformer.{}.lora_B.weight", alpha=None,
              name="lora.safetensors", metadata=None, **more):  # fmt: skip
        tensors = {}
        for module, (rows, width) in shapes.items():
            tensors[down.format(module)] = noise(4, width)
            tensors[up.format(module)] = noise(rows, 4) / 10
            if alpha:
                tensors[alpha.format(module)] = torch.tensor(8.0)
        save_file(tensors | more, tmp_path / name, metadata=metadata)
        return tmp_path / name

    return write


@pytest.fixture
def finetune(folder: Path, tmp_path: Path) -> Path:
    """Another transformer for the tiny pipeline, in one file."""
    save_file(
        {n: t * 1.5 for n, t in tensors_of(folder).items()}, tmp_path / "finetune.safetensors"
    )
    return tmp_path / "finetune.safetensors"
