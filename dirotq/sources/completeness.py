"""Whether a pipeline's folder holds everything that its components need, before any of it is used.

One definition per kind: a model has exactly the tensors of its class, a tokenizer knows words, a
scheduler and a processor can be made, and only what the pipeline can do without is null.
"""

import functools
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError, DirotqError
from dirotq.files.digest import stamps
from dirotq.files.json_file import INDEX, components, denoisers, read_json
from dirotq.models.families import is_denoiser
from dirotq.models.installed import SAVED_BY, installed
from dirotq.quiet import quiet
from dirotq.sources.components import DENOISER, class_named, is_entry, problems
from dirotq.sources.packages import refuse_missing_packages

log = logging.getLogger(__name__)

DISPENSABLE = ("text_encoder_3", "tokenizer_3")
"""Components that Stable Diffusion 3 goes on without, though its classes don't say so."""
TEXT = ("text_encoder", "tokenizer")
SECOND = "transformer_2"
"""The expert that pipelines of Wan 2.2's kind call below ``boundary_ratio``."""


def refuse_incomplete(
    folder: Path,
    source: str,
    *,
    weights: bool = True,
    without: Collection[str] = (),
    prompts: bool = True,
    error: type[DirotqError] = ConfigError,
) -> None:
    """Raise ``error`` if a diffusers pipeline lacks anything, holds too much or can't be made.

    source   its name in errors
    weights  they are there; otherwise only configurations, tokenizers and the like are checked
    without  components whose weights don't count
    prompts  texts will be encoded, so the encoders can't be null even where the class allows it

    Raises UnsupportedError for packages that are not installed. Files that are as they were at the
    last call are not looked at again.
    """
    refuse_missing_packages(folder, source, prompts=prompts)
    if unknown := list(_unknown_classes(folder)):
        raise error(
            f"{source} can't be opened here: {'; '.join(unknown)}. Install a version that has it, "
            "or correct a name that is misspelt"
        )
    found = _problems(folder.resolve(), weights, tuple(without), prompts, stamps(folder))
    if found:
        more = f" ({len(found) - 3} more)" if len(found) > 3 else ""
        raise error(
            f"{source} is incomplete or damaged: {'; '.join(found[:3])}{more}. Download or save "
            "the model again; what is missing would be made up by the loaders, in silence"
        )


def _unknown_classes(folder: Path) -> Iterator[str]:
    """Say which classes the installed libraries lack, and which version has them, if that is told.

    Downloading again would mend none of them. Those of the denoiser are told elsewhere
    (models/families.py).
    """
    import diffusers

    index = read_json(folder / INDEX)
    name = index.get("_class_name")
    with quiet():
        if not hasattr(getattr(diffusers, str(name), None), "_optional_components"):
            yield f"{INDEX} names the pipeline {name!r}, which is none of {installed(index)}"
        for part, (library, cls) in components(index).items():
            if part == DENOISER or class_named(library, cls) is not None:
                continue
            config = folder / part / "config.json"
            said = read_json(config) if config.is_file() else {}
            known = library if library in SAVED_BY else "diffusers"
            yield f"the {part} is a {cls!r}, which is no class of {installed(said, known)}"


@functools.lru_cache(maxsize=32)
def _problems(
    folder: Path, weights: bool, without: tuple[str, ...], prompts: bool, _: Any
) -> tuple[str, ...]:
    with quiet():
        return tuple(_all_problems(folder, weights, without, prompts))


def _all_problems(
    folder: Path, weights: bool, without: Collection[str], prompts: bool
) -> Iterator[str]:
    import diffusers

    index = read_json(folder / INDEX)
    name = index.get("_class_name")
    pipeline: Any = getattr(diffusers, str(name), None)
    required, optional = map(set, pipeline._get_signature_keys(pipeline))
    spare = _dispensable(pipeline, prompts)
    for part in sorted(required | (optional & index.keys())):
        entry = index.get(part)
        if entry in (None, [None, None]):
            if part in required - spare:
                yield f"{INDEX} names no {part}, without which a {name} can't work"
        elif part in optional and not _names_classes(entry):
            continue  # an option of the pipeline, no component
        elif not is_entry(entry):
            yield f"{INDEX} says {entry!r} of the {part}, where [library, class] belongs"
        elif not (folder / part).is_dir():
            yield f"the {part} is listed in {INDEX}, but there is no such folder"
        else:
            partner = index.get(part.replace("tokenizer", "text_encoder"))
            counts = weights and part not in without
            for problem in problems(folder / part, entry, partner, weights=counts):
                yield f"{part} ({entry[1]}) {problem}"
    yield from _other_denoiser(pipeline, index)
    yield from _one_expert(name, index)
    for part in sorted(index.keys() - required - optional):
        if is_entry(index[part]):
            log.warning("%s: a %s has no place for the %s: it is left out", folder, name, part)


def _other_denoiser(pipeline: Any, index: Mapping[str, Any]) -> Iterator[str]:
    """Say which denoiser is of another class than the pipeline calls, which fails at its call."""
    wanted = pipeline._get_signature_types()
    for part, entry in components(index).items():
        known = [cls for cls in wanted.get(part, ()) if is_denoiser(cls)]
        cls = class_named(*entry)
        if DENOISER in part and known and cls and not issubclass(cls, tuple(known)):
            allowed = " or a ".join(sorted(cls.__name__ for cls in known))
            yield (
                f"{INDEX} says that the {part} is a {cls.__name__}, and a {pipeline.__name__} "
                f"calls a {allowed}"
            )


def _one_expert(name: Any, index: Mapping[str, Any]) -> Iterator[str]:
    """Say which of two experts is missing; ``boundary_ratio`` divides the steps between them."""
    ratio, second = index.get("boundary_ratio"), is_entry(index.get(SECOND))
    if ratio is not None and not second:
        yield (
            f"{INDEX} says boundary_ratio {ratio!r:.20}, by which a {name} denoises with two "
            f"experts, but it names no {SECOND}, the expert of low noise"
        )
    if second and ratio is None:
        yield (
            f"{INDEX} names a {SECOND} but no boundary_ratio, below which a {name} would call it: "
            "it would never be used"
        )
    if not second or ratio is None:
        return
    number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if not number or not 0 < ratio < 1:
        yield (
            f"{INDEX} says boundary_ratio {ratio!r:.20}, the share of timesteps below which a "
            f"{name} calls its {SECOND}: it is a number between 0 and 1, or one expert is never "
            "used"
        )
    if index[SECOND] != index.get(DENOISER):
        yield (
            f"{INDEX} says {index[SECOND]!r} of the {SECOND} and {index.get(DENOISER)!r} of the "
            f"{DENOISER}: two experts are of one class"
        )


def packed_parts(folder: Path) -> list[str]:
    """Name the folder's denoisers that say they are quantized."""
    configs = {p: folder / p / "config.json" for p in denoisers(read_json(folder / INDEX))}
    return [p for p, c in configs.items() if c.is_file() and "quantization_config" in read_json(c)]


def _names_classes(entry: Any) -> bool:
    """Tell a component, right or wrong, from an option: those may be lists too, of numbers."""
    return isinstance(entry, list) and any(isinstance(value, str) for value in entry)


def absent(folder: Path) -> dict[str, None]:
    """Return components that a pipeline goes on without, as from_pretrained wants to be told."""
    index = read_json(folder / INDEX)
    if not str(index.get("_class_name")).startswith("StableDiffusion3"):
        return {}
    return {part: None for part in DISPENSABLE if index.get(part) in (None, [None, None])}


def _dispensable(pipeline: Any, prompts: bool) -> set[str]:
    """Return components that may be null; where texts are encoded, what does that may not."""
    spare = set(pipeline._optional_components) - {DENOISER}
    if prompts:
        spare = {part for part in spare if not part.startswith(TEXT)}
    return spare | set(DISPENSABLE if pipeline.__name__.startswith("StableDiffusion3") else ())
