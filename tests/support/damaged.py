"""Copies of the tiny pipelines that a test may damage, and ways to damage them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_pipelines import PIPELINES, family_folder
from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.sources.completeness import refuse_incomplete

__all__ = ["own"]

FAMILIES = ("flux", *PIPELINES)
Tensors = dict[str, Tensor]


@pytest.fixture
def own(tiny_root: Path, tmp_path: Path) -> Callable[[str], Path]:
    """``own("sd3")``: a copy of a family's tiny pipeline that a test may damage."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(family_folder(tiny_root, name), tmp_path / name))

    return copy


def weights_of(part: Path) -> Path:
    (file,) = part.glob("*.safetensors")
    return file


def rewrite(part: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors that a component's only file holds."""
    file = weights_of(part)
    tensors = change(load_file(file))
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, metadata={"format": "pt"})


def edit(file: Path, **values: Any) -> None:
    """Change entries of a JSON file; ``...`` removes one."""
    found = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))


def refused(folder: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_incomplete(folder, "the model", **options)
    for part in ("the model is incomplete or damaged", *parts):
        assert part in str(caught.value)
