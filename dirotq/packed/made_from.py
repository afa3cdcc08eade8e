"""What a packed model's card says of the 16-bit model that it is made from."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from dirotq.packed.card import CARRIED, LARGEST, README, Base
from dirotq.sources.lora import parse_loras
from dirotq.sources.model import DiffusersModel
from dirotq.sources.origin import on_hub


def base_of(model: DiffusersModel) -> Base:
    """Describe the model that is packed: its id if it has one, terms, finetune and LoRAs.

    Terms are those that the card in its folder states; no path of this machine is told.
    """
    source = model.pipeline_source
    carried = _facts(model.folder(weights=False, complete=False) / README)
    place = on_hub(source)
    name, said = carried.pop("base_model", None), f"The 16-bit model `{Path(source).name}`."
    if place is not None:
        name, said = place.id, f"[{place.id}]({place.url}), commit `{place.commit}`."
    if source != model.path:
        said += f" The transformer is that of `{Path(model.path).name}`."
    loras = [
        f"`{Path(lora.path).name}` (weight {lora.weight:g})" for lora in parse_loras(model.lora)
    ]
    if loras:
        said += f" LoRAs in its weights: {', '.join(loras)}."
    return Base(name if _is_id(name) else None, said, carried)


def _facts(card: Path) -> dict[str, Any]:
    """Read plain facts of a card; nothing of one that is missing, long or damaged."""
    if not card.is_file() or card.stat().st_size > LARGEST:
        return {}
    try:
        text = card.read_text(encoding="utf-8")
        if not text.lstrip().startswith("---"):  # ModelCard would warn that it states nothing
            return {}
        data = ModelCard(text).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return {}
    wanted = (*CARRIED, "base_model")
    return {k: v for k, v in data.items() if k in wanted and isinstance(v, str | list)}


def _is_id(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
