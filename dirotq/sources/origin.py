"""Where a pipeline comes from: a local diffusers folder or a repository of the Hugging Face Hub.

Either way the rest of DiRotQ sees a plain, checked folder. Of a repository only what is used is
downloaded: configurations and tokenizers for a plan, safetensors when weights are read.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.files.digest import input_digests, stamps
from dirotq.files.json_file import CALL_FILE, INDEX, components, read_json
from dirotq.models.families import family_of
from dirotq.sources.completeness import refuse_incomplete
from dirotq.sources.doors import refuse_doors
from dirotq.sources.prompts import resolve

from .folder import SETTINGS, STEMS, carried_files, missing_weights, pipeline_files, weight_names
from .hub import HubPath, hub_path, unproven
from .weights import read_header, refuse_quantized

CARD = "README.md"
MODULAR = "modular_model_index.json"
LICENCES = ("LICEN[SC]E*", "NOTICE*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
OTHERS = (".safetensors", ".gguf", ".onnx", ".msgpack", ".h5", *PICKLES)
"""Suffixes of weights, whether they are read or not."""
VARIANT = re.compile(r"(?:diffusion_pytorch_)?model\.(\w+?)(?:-\d{5}-of-\d{5})?\.safetensors")
"""A file that `save_pretrained(variant=...)` named."""


def pipeline_folder(
    source: str, *, weights: bool, without: str = "", complete: bool = True
) -> Path:
    """Return the checked diffusers folder behind a path or hub id.

    weights   with the weights of its components; without, those of a repository may be missing
    without   a component whose weights are not needed
    complete  hold each component against its class, too, which takes seconds of imports

    Raises ConfigError if there is no such pipeline, it is damaged or incomplete, holds weights only
    as pickles, or leads out of its folder (dirotq/sources/folder.py); UnsupportedError if its
    denoiser is no transformer or is quantized already, or it needs code of its own.
    """
    place = on_hub(source)
    if place is None:
        root = resolve(source)
        _check_local(root, source, without, stamps(root))
        weights = True  # they are here anyway
    else:
        root = _fetch(place, weights=False)
        index = read_json(root / INDEX)
        _refuse_foreign(root, index, source)
        if weights:
            _fetch(place, weights=True, without=without)
        pipeline_files(root, index)
        unproven(root, _used(root, index, without), place.listing())
        if weights:
            _refuse_weights(root, index, source, without)
    if complete:
        refuse_incomplete(root, source, weights=weights, without=(without,))
    return root


@functools.lru_cache(maxsize=32)
def _check_local(root: Path, source: str, without: str, _: Any) -> None:
    """Refuse what is no pipeline's folder. One that is as it was is not read again:
    every stage asks, often.
    """
    _refuse_no_pipeline(root, source)
    _refuse_pickles(root)
    index = read_json(root / INDEX)
    _refuse_foreign(root, index, source)
    pipeline_files(root, index)  # all can be read, no link leaves
    _refuse_weights(root, index, source, without)


def pipeline_identity(source: str, *, without: str = "") -> dict[str, Any]:
    """Return what stands in a fingerprint: a repository's commit, or the digest of each file.

    A commit stands for its files as far as each is held against the id that the hub gives it
    (dirotq/sources/hub.py). Files that have none, in a cache that was copied without its links or
    edited, count by their digests, as those of a local folder do. Weights of the component
    ``without`` don't count.

    Raises what :func:`pipeline_folder` raises, but for what is incomplete.
    """
    root = pipeline_folder(source, weights=False, without=without, complete=False)
    index = read_json(root / INDEX)
    if (place := on_hub(source)) is None:
        return {"files": _digests(root, pipeline_files(root, index, without=without))}
    if not unproven(root, _used(root, index, without), place.listing()):
        return place.identity()
    # All of them, or a download would give another fingerprint to the same model.
    pipeline_folder(source, weights=True, without=without, complete=False)
    unknown = unproven(root, _used(root, index, without), place.listing())
    return place.identity() | {"files": _digests(root, unknown)}


def _digests(root: Path, files: list[Path]) -> dict[str, str]:
    digests = input_digests(files)
    return {str(path.relative_to(root)): digests[path] for path in files}


def _used(root: Path, index: Mapping[str, Any], without: str) -> list[Path]:
    """List files of a snapshot that are read, as far as they are here."""
    files = carried_files(root, index)
    return [p for p in files if not (p.suffix == ".safetensors" and p.parent.name == without)]


def single_file(source: str) -> Path | None:
    """Return the .safetensors file that ``source`` names; None if that is no single file.

    Raises ConfigError if the file does not exist or is a pickle, UnsupportedError if it is GGUF.
    """
    path = resolve(source)
    if path.is_dir() or path.suffix not in (".safetensors", ".gguf", *PICKLES):
        return None
    if path.suffix == ".gguf":
        raise UnsupportedError(
            f"{source} is a GGUF file: its weights are quantized already, and what DiRotQ would "
            "measure is lost. Compress the 16-bit model that it was made from"
        )
    if path.suffix in PICKLES:
        raise ConfigError(
            f"{source} is a pickle, which can run code when loaded and is refused; most finetunes "
            "are offered as .safetensors too. Or convert it where you trust it"
        )
    if not path.is_file():
        raise ConfigError(f"{source}: there is no such file; download it and give its path")
    return path


def on_hub(source: str) -> HubPath | None:
    """Return the repository that ``source`` names, unless there is such a folder here."""
    if "://" in source or resolve(source).exists():
        return None
    place = hub_path(source, "model")
    return None if place is None or place.file else place


def _fetch(place: HubPath, *, weights: bool, without: str = "") -> Path:
    root = place.fetch([INDEX, MODULAR, CALL_FILE])
    if not (root / INDEX).is_file():
        _refuse_modular(root, place.url)
        raise ConfigError(
            f"{place.url} is no diffusers pipeline: it has no {INDEX}. Many models are offered "
            "twice; look for the repository that says `diffusers` (often named ...-Diffusers). A "
            "single .safetensors file can be downloaded and given as model=FILE"
        )
    index = read_json(root / INDEX)
    _refuse_blocks(index, place.url)
    wanted = [f"{part}/*.{suffix}" for part in components(index) for suffix in SETTINGS]
    here = place.fetch([INDEX, CALL_FILE, CARD, *LICENCES, *wanted])
    if weights:
        # Of most repositories the standard names; an index may have other ones.
        usual = {f"{stem}{n}.safetensors" for stem in STEMS for n in ("", "-?????-of-?????")}
        parts = _model_parts(here, index, without)
        place.fetch([f"{p.name}/{n}" for p in parts for n in sorted(usual | weight_names(p))])
    return here


def _model_parts(root: Path, index: Mapping[str, Any], without: str) -> list[Path]:
    """List folders of components that have weights: schedulers and tokenizers have none."""
    return [
        root / name
        for name in components(index)
        if name != without
        and (root / name / "config.json").is_file()
        and not (root / name / "tokenizer_config.json").is_file()
    ]


def _refuse_no_pipeline(root: Path, source: str) -> None:
    if (root / INDEX).is_file():
        _refuse_blocks(read_json(root / INDEX), source)
        return
    if root.is_file():
        raise UnsupportedError(
            f"{source} is a file of a kind that DiRotQ does not read; a model is a diffusers "
            "folder, a hub id, or one .safetensors file with a 16-bit transformer"
        )
    _refuse_modular(root, source)
    found = sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else "nothing"
    raise ConfigError(
        f"{source} is no diffusers pipeline: it has no {INDEX} (found {found}). Give the folder "
        "that pipeline.save_pretrained(...) wrote, a hub id (org/name), or a .safetensors file"
    )


def _refuse_modular(root: Path, source: str) -> None:
    if (root / MODULAR).is_file():
        raise UnsupportedError(
            f"{source} is a modular pipeline (it has a {MODULAR}, but no {INDEX}), which DiRotQ "
            "can't call. FLUX.3 and MiniMax-H3 are nothing else in diffusers; of other models take "
            f"the repository that has a {INDEX}"
        )


def _refuse_blocks(index: Mapping[str, Any], source: str) -> None:
    """Refuse a modular pipeline under the name of a plain one."""
    name = str(index.get("_class_name"))
    if "_blocks_class_name" in index or name.endswith("ModularPipeline"):
        raise UnsupportedError(
            f"{source} is a modular pipeline (its {INDEX} names {name!r}), which DiRotQ can't "
            "call. Take the repository whose index names a plain pipeline of the model"
        )


def _refuse_pickles(root: Path) -> None:
    for part in sorted(p for p in root.iterdir() if p.is_dir()):
        pickles = sorted(p.name for p in part.iterdir() if p.suffix in PICKLES)
        if pickles and not list(part.glob("*.safetensors")):
            raise ConfigError(
                f"{part} holds its weights as a pickle ({pickles[0]}), which can run code when "
                "loaded and is refused. Convert it where you trust it: "
                "DiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder, "
                "safe_serialization=True)"
            )


def _refuse_foreign(root: Path, index: Mapping[str, Any], source: str) -> None:
    """Refuse a pipeline that is not one of diffusers around one 16-bit diffusion transformer, or
    that needs code of its own.
    """
    refuse_doors(root)
    parts = components(index)
    if "transformer" not in parts and "unet" in parts:
        raise UnsupportedError(
            f"{source} ({index['_class_name']}) denoises with a UNet ({parts['unet'][1]}), as "
            "Stable Diffusion 1.5 and SDXL do; DiRotQ compresses diffusion transformers"
        )
    config = root / "transformer" / "config.json"
    if "transformer" in parts and not config.is_file():
        raise ConfigError(
            f"{source} lists a transformer ({parts['transformer'][1]}) in its {INDEX}, but has no "
            "transformer/config.json: the model is incomplete. Download or save it again"
        )
    if "transformer" not in parts:
        other = next((part for part in sorted(parts) if part.startswith("transformer")), None)
        advice = f". Call its {other} so, in {INDEX} and as folder" if other else ""
        advice += ", with a boundary_ratio of null" if other and index.get("boundary_ratio") else ""
        raise ConfigError(
            f"{source} has no component `transformer` (its components are {sorted(parts)}): DiRotQ "
            f"compresses pipelines whose denoiser is a diffusion transformer{advice}"
        )
    library, listed = parts["transformer"]
    settings = read_json(config)
    found = settings.get("_class_name")
    if not isinstance(found, str):
        raise ConfigError(
            f"{config} says {found!r:.60} as its _class_name, where the name of a transformer's "
            f"class belongs (by {INDEX} it is {listed!r}). Download the model again, or correct it"
        )
    if library != "diffusers" or found != listed:
        family_of(str(found), settings)  # a class that nobody knows is the first thing to say
        raise ConfigError(
            f"{source} contradicts itself: {INDEX} says that its transformer is a {listed} of "
            f"{library}, transformer/config.json that it is a {found}. Both must name the same "
            "class of diffusers; correct the wrong one"
        )
    for name in parts:
        file = root / name / "config.json"
        if file.is_file() and "quantization_config" in (values := read_json(file)):
            quantization = values["quantization_config"]
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise UnsupportedError(
                f"{source} is already quantized: its {name} carries a quantization_config "
                f"(quant_method {method!r}); compress the 16-bit model it was made from"
            )


def _others(part: Path) -> str:
    """Say which weights of other names lie in a component's folder, and how to use a variant."""
    if any(part.glob("*model.safetensors.index.json")):
        return ""  # they are its other shards
    found = sorted(file.name for file in part.iterdir() if file.suffix in OTHERS)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    there = f"It has {', '.join(found[:3])}{more}. " if found else ""
    variants = sorted({match[1] for name in found if (match := VARIANT.fullmatch(name))})
    hint = (
        f"from_pretrained(folder, variant={variants[0]!r}) opens what is there, and "
        "save_pretrained(another_folder) writes it as it is read. "
        if variants
        else ""
    )
    return f"{there}Files of other names (pickles, GGUF, fp16 or ema variants) are not used. {hint}"


def _refuse_weights(root: Path, index: Mapping[str, Any], source: str, without: str) -> None:
    for part in _model_parts(root, index, without):
        if missing := missing_weights(part):
            raise ConfigError(
                f"{source}: the component {part.name} lacks {', '.join(missing[:4])}. "
                f"{_others(part)}Download the model again, or write one with "
                "pipeline.save_pretrained(folder, safe_serialization=True)"
            )
        for name in sorted(weight_names(part)):
            refuse_quantized(read_header(part / name), f"{part.name}/{name} of {source}")
