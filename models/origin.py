"""Where a pipeline comes from: a local diffusers folder or a repository of the Hugging Face Hub.

Either way the rest of DiRotQ sees a plain, checked folder. Of a repository only what is used is
downloaded: configurations and tokenizers for a plan, safetensors when weights are read.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from dirotq.digest import input_digests
from dirotq.errors import ConfigError, UnsupportedError
from dirotq.hub import HubPath, hub_path
from dirotq.loading import check_weights
from dirotq.prompts import resolve

from .families import family_of

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
IGNORED = ("README.md", "training.json", ".gitattributes")
INDEX = "model_index.json"
CALL_FILE = "generation.json"
STEMS = ("diffusion_pytorch_model", "model")
"""Standard names of weights. Others are variants (fp16, ema) or another program's files."""

Header = Mapping[str, tuple[str, tuple[int, ...]]]
"""{tensor: (dtype as safetensors spells it, shape)}."""


def pipeline_folder(source: str, *, weights: bool, without: str = "") -> Path:
    """The checked diffusers folder behind a path or hub id.

    weights  with the weights of its components; without, those of a repository may be missing
    without  a component whose weights are not needed

    Raises ConfigError if there is no such pipeline, it is damaged or incomplete, or holds weights
    only as pickles; UnsupportedError if its denoiser is no transformer or is quantized already.
    """
    place = _on_hub(source)
    if place is None:
        root = resolve(source)
        _refuse_no_pipeline(root, source)
        _refuse_pickles(root)
        weights = True  # they are here anyway
    else:
        root = _fetch(place, weights=False)
    index = read_json(root / INDEX)
    _refuse_foreign(root, index, source)
    if place is not None and weights:
        _fetch(place, weights=True, without=without)
    if weights:
        for part in _model_parts(root, index, without):
            _refuse_weights(part, source)
    return root


def pipeline_identity(source: str, *, without: str = "") -> dict[str, Any]:
    """What stands in a fingerprint: a repository's commit, or the digest of every file that counts.

    without  a component whose weights don't count

    Raises what :func:`pipeline_folder` raises.
    """
    if (place := _on_hub(source)) is not None:
        return place.identity()
    root = pipeline_folder(source, weights=False, without=without)
    files = [
        p
        for p in sorted(root.rglob("*"))
        if p.is_file()
        and p.name not in IGNORED
        and p.suffix not in (".png", ".jpg")
        and not (p.suffix == ".safetensors" and p.parent == root / without)
    ]
    digests = input_digests(files)
    return {"files": {str(p.relative_to(root)): digests[p] for p in files}}


def single_file(source: str) -> Path | None:
    """The .safetensors file that ``source`` names, or None if it names a folder or a repository.

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


def components(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """{component: (library, class)} of a model_index.json, without those that are switched off."""
    found = {}
    for name, value in index.items():
        match value:
            case [str(library), str(cls)]:
                found[name] = (library, cls)
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Raises ConfigError if it is no JSON object."""
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}); download the model again") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} is no JSON object; download the model again")
    return values


def read_header(file: Path) -> Header:
    """Name, dtype and shape of every tensor of a safetensors file.

    Raises ArtifactError if it is truncated.
    """
    stat = file.stat()
    return _header(file, stat.st_size, stat.st_mtime_ns)


def refuse_quantized(header: Header, name: str) -> None:
    """Raise UnsupportedError if weights are stored in fewer than 16 bits."""
    for tensor, (dtype, _) in header.items():
        if dtype.startswith(("F8", "F6", "F4")) or dtype in ("I8", "U8", "I4", "U4"):
            raise UnsupportedError(
                f"{name} is already quantized: {tensor} is stored as {dtype} (fp8, int8, nf4 and "
                "other files of fewer than 16 bits have lost what DiRotQ would measure). Compress "
                "the 16-bit model that it was made from"
            )


@functools.lru_cache(maxsize=256)
def _header(file: Path, size: int, mtime_ns: int) -> Header:
    check_weights(file)
    with safe_open(file, framework="pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def _on_hub(source: str) -> HubPath | None:
    """The repository that ``source`` names, unless there is such a folder here."""
    if "://" in source or resolve(source).exists():
        return None
    place = hub_path(source, "model")
    return None if place is None or place.file else place


def _fetch(place: HubPath, *, weights: bool, without: str = "") -> Path:
    root = place.fetch([INDEX, CALL_FILE], lambda here: (here / INDEX).is_file())
    if not (root / INDEX).is_file():
        raise ConfigError(
            f"{place.url} is no diffusers pipeline: it has no {INDEX}. Many models are offered "
            "twice; look for the repository that says `diffusers` (often named ...-Diffusers). A "
            "single .safetensors file can be downloaded and given as model=FILE"
        )
    index = read_json(root / INDEX)
    parts = components(index)
    wanted = [f"{part}/*.{suffix}" for part in parts for suffix in ("json", "txt", "model")]
    here = place.fetch([INDEX, CALL_FILE, *wanted], lambda here: _has_settings(here, parts))
    if weights:
        files = [
            f"{part.name}/{stem}{number}.safetensors"
            for part in _model_parts(here, index, without)
            for stem in STEMS
            for number in ("", "-?????-of-?????")
        ]
        place.fetch(files, lambda here: not any(map(_missing, _model_parts(here, index, without))))
    return here


def _has_settings(root: Path, parts: Mapping[str, Any]) -> bool:
    return all((root / part).is_dir() and any((root / part).glob("*.json")) for part in parts)


def _model_parts(root: Path, index: Mapping[str, Any], without: str) -> list[Path]:
    """Folders of the components that have weights: schedulers and tokenizers have none."""
    return [
        root / name
        for name in components(index)
        if name != without
        and (root / name / "config.json").is_file()
        and not (root / name / "tokenizer_config.json").is_file()
    ]


def _missing(part: Path) -> list[str]:
    """Weights files of a component that are not there, by their standard names."""
    for stem in STEMS:
        if (index := part / f"{stem}.safetensors.index.json").is_file():
            shards = {str(name) for name in read_json(index).get("weight_map", {}).values()}
            return sorted(name for name in shards if not (part / name).is_file())
        if (part / f"{stem}.safetensors").is_file():
            return []
    return [" or ".join(f"{stem}.safetensors" for stem in STEMS)]


def _refuse_no_pipeline(root: Path, source: str) -> None:
    if (root / INDEX).is_file():
        return
    if root.is_file():
        raise UnsupportedError(
            f"{source} is a file of a kind that DiRotQ does not read; a model is a diffusers "
            "folder, a hub id, or one .safetensors file with a 16-bit transformer"
        )
    found = sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else "nothing"
    raise ConfigError(
        f"{source} is no diffusers pipeline: it has no {INDEX} (found {found}). Give the folder "
        "that pipeline.save_pretrained(...) wrote, a hub id (org/name), or a .safetensors file"
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
    """Refuse a pipeline that is not one of diffusers around one 16-bit diffusion transformer."""
    parts = components(index)
    if not isinstance(index.get("_class_name"), str):
        raise UnsupportedError(
            f"{source} needs code of its own ({INDEX} says _class_name "
            f"{index.get('_class_name')!r}); only pipelines of diffusers itself are loaded"
        )
    if "transformer" not in parts and "unet" in parts:
        raise UnsupportedError(
            f"{source} ({index['_class_name']}) denoises with a UNet ({parts['unet'][1]}), as "
            "Stable Diffusion 1.5 and SDXL do; DiRotQ compresses diffusion transformers"
        )
    config = root / "transformer" / "config.json"
    if "transformer" not in parts or not config.is_file():
        raise ConfigError(
            f"{source} has no transformer/config.json (its components are {sorted(parts)}): DiRotQ "
            "compresses pipelines whose denoiser is a diffusion transformer"
        )
    library, listed = parts["transformer"]
    found = read_json(config).get("_class_name")
    if library != "diffusers" or found != listed:
        family_of(str(found))  # a class that nobody knows is the first thing to say
        raise ConfigError(
            f"{source} contradicts itself: {INDEX} says that its transformer is a {listed} of "
            f"{library}, transformer/config.json that it is a {found}. Both must name the same "
            "class of diffusers; correct the wrong one"
        )
    for name in parts:
        settings = root / name / "config.json"
        if settings.is_file() and "quantization_config" in (values := read_json(settings)):
            quantization = values["quantization_config"]
            method = quantization.get("quant_method") if isinstance(quantization, dict) else None
            raise UnsupportedError(
                f"{source} is already quantized: its {name} carries a quantization_config "
                f"(quant_method {method!r}); compress the 16-bit model it was made from"
            )


def _refuse_weights(part: Path, source: str) -> None:
    if missing := _missing(part):
        raise ConfigError(
            f"{source}: the component {part.name} lacks {', '.join(missing[:4])}. Files of other "
            "names (.bin, fp16 or ema variants) are not used; download the model again, or write "
            "one with pipeline.save_pretrained(folder, safe_serialization=True)"
        )
    for file in sorted(part.glob("*.safetensors")):
        refuse_quantized(read_header(file), f"{part.name}/{file.name} of {source}")
