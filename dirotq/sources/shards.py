"""A transformer's weights in several files, divided as ``save_pretrained`` divides them."""

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory

from .weights import INDEX, WHOLE


def plan_shards(sizes: Mapping[str, int], limit: int) -> StateDictSplit:
    """Return which tensors go into which file.

    sizes  bytes of each tensor as it will be stored
    limit  bytes of a file; a larger tensor has a file of its own
    """
    return split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=lambda size: size,
        filename_pattern=WHOLE.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=limit,
    )


def write_index(folder: Path, shards: StateDictSplit) -> None:
    """Write the file that says which shard holds which tensor; nothing for a single file."""
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
