"""A transformer in one .safetensors file, as finetunes are shared: what it is, and its tensors.

It may have diffusers' names or those of the original code; the converters behind diffusers'
``from_single_file`` translate. They are called on tensors that stay on disk until they are written,
and what they make is held against the class, so that nothing is missing or left over.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.files.json_file import read_json
from dirotq.models.skeleton import empty_transformer

from .traced import left_out, plain, traced
from .weights import Header, read_header, refuse_quantized

log = logging.getLogger(__name__)

PREFIX = "model.diffusion_model."  # of the transformer, in files that hold a whole pipeline
# Tensors of the original code that its own forward does not read, or computes anew.
NOT_READ = ("pos_embed", "y_embedder.y_embedding", "norm_final.weight", "rope.inv_freq")

# Layouts of diffusers: tensors that tell them apart (the first that fits), what they belong to, and
# the repository that has the rest of the pipeline. Of original layouts diffusers knows both.
MARKS: tuple[tuple[frozenset[str], str, str], ...] = tuple(
    (frozenset(names.split()), looks, repo)
    for names, looks, repo in (
        ("lora_", "a LoRA (give it as model.lora, with its base model as model)", ""),
        ("single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight", "FLUX.2",
         "black-forest-labs/FLUX.2-dev"),
        ("single_transformer_blocks.0.proj_mlp.weight "
         "time_text_embed.guidance_embedder.linear_1.weight", "FLUX.1-dev",
         "black-forest-labs/FLUX.1-dev"),
        ("single_transformer_blocks.0.proj_mlp.weight", "FLUX.1-schnell",
         "black-forest-labs/FLUX.1-schnell"),
        ("transformer_blocks.0.img_mlp.net.0.proj.weight", "Qwen-Image", "Qwen/Qwen-Image"),
        ("pos_embed.pos_embed transformer_blocks.37.attn.add_q_proj.weight",
         "Stable Diffusion 3.5 Large", "stabilityai/stable-diffusion-3.5-large"),
        ("pos_embed.pos_embed transformer_blocks.0.attn2.to_q.weight "
         "transformer_blocks.0.attn.add_q_proj.weight",
         "Stable Diffusion 3.5 Medium", "stabilityai/stable-diffusion-3.5-medium"),
        ("pos_embed.pos_embed transformer_blocks.0.attn.add_q_proj.weight",
         "Stable Diffusion 3", "stabilityai/stable-diffusion-3-medium-diffusers"),
        ("noise_refiner.0.attention.to_q.weight", "Z-Image", "Tongyi-MAI/Z-Image-Turbo"),
        ("transformer_blocks.0.ff.conv_inverted.weight", "SANA",
         "Efficient-Large-Model/Sana_1600M_1024px_diffusers"),
        ("adaln_single.linear.weight caption_projection.linear_1.weight "
         "transformer_blocks.0.attn2.to_q.weight", "PixArt",
         "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
        ("condition_embedder.text_embedder.linear_1.weight blocks.39.attn1.to_q.weight",
         "Wan 14B", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
        ("condition_embedder.text_embedder.linear_1.weight", "Wan 1.3B",
         "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("down_blocks.0.resnets.0.conv1.weight", "a UNet of Stable Diffusion", ""),
        ("decoder.conv_in.weight", "an image autoencoder (VAE)", ""),
    )
)  # fmt: skip


class Looks(NamedTuple):
    """What a file's tensors resemble, and the repository of that model's other components."""

    like: str
    base: str


def looks(file: Path) -> Looks:
    """Tell what a file seems to hold by its header; UnsupportedError if it is quantized."""
    header = read_header(file)
    refuse_quantized(header, str(file))
    if any(".lora_" in name or ".lora." in name for name in header):
        return Looks(MARKS[0][1], "")
    for names, like, base in MARKS[1:]:
        if names <= header.keys():
            return Looks(like, base)
    return _original(header) or Looks(f"nothing known (its tensors are {sorted(header)[:3]})", "")


def default_base(file: Path, source: str) -> str:
    """Return the hub id of the pipeline that a file belongs to; ConfigError if it is unknown."""
    found = looks(file)
    if not found.base:
        raise ConfigError(
            f"{source} looks like {found.like}. A single file holds a 16-bit diffusion "
            "transformer; if this one does, name the pipeline that it belongs to: "
            "model.base=FOLDER or model.base=org/name"
        )
    return found.base


def converted(file: Path, transformer: Path, source: str) -> dict[str, Tensor]:
    """Return the file's tensors under diffusers' names, on disk until they are touched.

    transformer  folder with the config.json of the class

    Raises ConfigError if they are not exactly what that class stores.
    """
    import diffusers

    refuse_quantized(read_header(file), source)
    config = read_json(transformer / "config.json")
    name = config["_class_name"]
    empty = empty_transformer(config, getattr(diffusers, name), buffers=False).state_dict()
    wanted = {key: tuple(tensor.shape) for key, tensor in empty.items()}
    tensors, unused = _transformer_of(file, source), list[str]()
    if not wanted.keys() <= tensors.keys():
        tensors, unused = _convert(tensors, config, name)
    wrong = [
        *(f"{key} is missing" for key in wanted if key not in tensors),
        *(f"{key} is used nowhere" for key in unused),
        *(f"{key} is not part of it" for key in tensors if key not in wanted),
        *(
            f"{key} is {list(tensors[key].shape)} instead of {list(shape)}"
            for key, shape in wanted.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        ),
    ]
    if wrong:
        raise ConfigError(
            f"{source} does not fit the {name} that its base pipeline describes: {len(wrong)} "
            f"differences, first {'; '.join(wrong[:3])}. It looks like {looks(file).like}; name "
            "the pipeline that it was made from with model.base=FOLDER or model.base=org/name"
        )
    return {key: tensors[key] for key in wanted}


def _transformer_of(file: Path, source: str) -> dict[str, Tensor]:
    """Read the file's tensors without the prefix; of a whole pipeline those of its transformer."""
    tensors = load_file(file)
    ours = {k.removeprefix(PREFIX): t for k, t in tensors.items() if k.startswith(PREFIX)}
    if not ours:
        return tensors
    others = [key for key in tensors if not key.startswith(PREFIX)]
    tops = {key.partition(".")[0] for key in ours}
    if twice := [key for key in others if key.partition(".")[0] in tops]:
        raise ConfigError(
            f"{source} holds tensors with the prefix {PREFIX!r} and without it, such as "
            f"{twice[0]}: two transformers, or the remains of one. Save a copy with only one of "
            "them"
        )
    if others:
        log.warning(
            "%s holds a whole pipeline; %d of its tensors (%s) are not used: these components "
            "come from the base pipeline",
            source, len(others), ", ".join(sorted({key.partition(".")[0] for key in others})[:8]),
        )  # fmt: skip
    return ours


def _convert(
    tensors: dict[str, Tensor], config: Mapping[str, Any], name: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Return tensors under diffusers' names, or as they are if it can't convert them; and those
    that it passes over."""
    # Not from_single_file itself: it holds the whole model in memory and passes over tensors that
    # are missing.
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    convert = SINGLE_FILE_LOADABLE_CLASSES.get(name, {}).get("checkpoint_mapping_fn")
    if convert is None:
        return tensors, []
    try:
        made = convert(checkpoint=traced(tensors), config=dict(config))
        return plain(made), [key for key in left_out(tensors, made) if key not in NOT_READ]
    except Exception:  # noqa: BLE001 - made for another architecture; the caller says what differs
        return tensors, []


def _original(header: Header) -> Looks | None:
    """Tell what diffusers takes a file with original names for."""
    from diffusers.loaders import single_file_utils as known

    shapes = {name: SimpleNamespace(shape=shape) for name, (_, shape) in header.items()}
    try:
        kind = known.infer_diffusers_model_type(shapes)
    except Exception:  # noqa: BLE001 - it was not written for such names
        return None
    if kind == "v1" and known.CHECKPOINT_KEY_NAMES["v1"] not in header:
        return None  # its answer to everything that it does not know
    place = known.DIFFUSERS_DEFAULT_PIPELINE_PATHS.get(kind, {})
    return Looks(kind, place.get("pretrained_model_name_or_path", ""))
