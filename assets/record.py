"""training.json: what was done to make a model, and how well it came out."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers


def note(folder: Path, **entries: Any) -> None:
    """Merge entries into the training record, training.json; None removes one."""
    path = folder / "training.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    record = {k: v for k, v in (record | entries).items() if v is not None}
    path.write_text(json.dumps(record, indent=1) + "\n")


def note_machine(folder: Path, device: torch.device) -> None:
    """Note the versions and the device that the training ran on."""
    note(
        folder,
        versions={m.__name__: m.__version__ for m in (torch, transformers, diffusers)},
        device=torch.cuda.get_device_name() if device.type == "cuda" else device.type,
    )
