"""``dirotq.load``: a packed folder as a working diffusers pipeline."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dirotq.device import compute_dtype, pick_device
from dirotq.errors import ArtifactError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load(
    folder: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None
) -> "DiffusionPipeline":
    """Load what ``pack`` wrote: a packed folder, or the ``pack`` artifact that holds one.

    device  ``auto``, ``cpu``, ``cuda``, ``cuda:N``
    dtype   of the parts that stay in 16 bits; float32 on a CPU and bfloat16 on a GPU by default

    Raises ArtifactError if the folder holds no packed pipeline, or a tensor is missing, extra or
    misshapen; UnsupportedError if it was packed by a newer format.
    """
    target = pick_device(device)
    return open_pipeline(packed_folder(folder), dtype or compute_dtype(target), target)


def open_pipeline(
    folder: Path, dtype: torch.dtype, device: torch.device
) -> "DiffusionPipeline":
    """A local diffusers folder, packed or not, from safetensors only and without progress bars."""
    import diffusers
    import transformers

    quiet = (diffusers.utils.logging, transformers.utils.logging)
    for logging in quiet:
        logging.disable_progress_bar()
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    for logging in quiet:
        logging.enable_progress_bar()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def packed_folder(folder: str | Path) -> Path:
    """The diffusers folder itself, checked to hold a transformer packed by DiRotQ."""
    root = Path(folder).expanduser()
    root = root / "data" / "model" if (root / "data" / "model").is_dir() else root
    config = root / "transformer" / "config.json"
    if not config.is_file() or not (root / "model_index.json").is_file():
        raise ArtifactError(
            f"{folder} holds no packed pipeline (no model_index.json with a transformer/config.json "
            "below it); give the folder that `dirotq compress` printed"
        )
    packing = json.loads(config.read_text()).get("quantization_config", {})
    if packing.get("quant_method") != "dirotq":
        raise ArtifactError(
            f"{folder} is a diffusers pipeline, but its transformer is not packed by DiRotQ "
            f"(quant_method {packing.get('quant_method')!r}); `dirotq compress model={folder}` packs it"
        )
    return root
