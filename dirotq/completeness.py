"""Whether a pipeline's folder holds everything that its components need, before any of it is used.

One definition per kind: a model has exactly the tensors of its class, a tokenizer knows words, a
scheduler and a processor can be made, and only what the pipeline can do without is null.
"""

import functools
import inspect
import json
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dirotq.errors import ConfigError, DirotqError
from dirotq.expected_tensors import difference, stored, too_deep, weight_files
from dirotq.loading import quiet
from dirotq.vocabulary import faults, missing_files

log = logging.getLogger(__name__)

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
DENOISER = "transformer"
DISPENSABLE = {"StableDiffusion3": ("text_encoder_3", "tokenizer_3")}
"""Components that pipelines of these names go on without, though their classes don't say so."""
TEXT = ("text_encoder", "tokenizer")


def refuse_incomplete(
    folder: Path,
    source: str,
    *,
    weights: bool = True,
    without: str = "",
    prompts: bool = True,
    error: type[DirotqError] = ConfigError,
) -> None:
    """Raise ``error`` if a diffusers pipeline lacks anything, holds too much or can't be made.

    source   its name in errors
    weights  they are there; otherwise only configurations, tokenizers and the like are checked
    without  a component whose weights don't count
    prompts  texts will be encoded, so the encoders can't be null even where the class allows it

    Files that are as they were at the last call are not looked at again.
    """
    found = _problems(folder.resolve(), weights, without, prompts, _stamp(folder))
    if found:
        more = f" ({len(found) - 3} more)" if len(found) > 3 else ""
        raise error(
            f"{source} is incomplete or damaged: {'; '.join(found[:3])}{more}. Download or save "
            "the model again; what is missing would be made up by the loaders, in silence"
        )


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What changes when a file does."""
    files = sorted(p for p in (*folder.glob("*"), *folder.glob("*/*")) if p.is_file())
    stats = ((file, file.stat()) for file in files)
    return tuple((str(f.relative_to(folder)), s.st_size, s.st_mtime_ns) for f, s in stats)


@functools.lru_cache(maxsize=32)
def _problems(
    folder: Path, weights: bool, without: str, prompts: bool, _: object
) -> tuple[str, ...]:
    with quiet():
        return tuple(_all_problems(folder, weights, without, prompts))


def _all_problems(folder: Path, weights: bool, without: str, prompts: bool) -> Iterator[str]:
    import diffusers

    try:
        index = read_settings(folder / INDEX)
    except ConfigError as error:
        yield f"it {error}"
        return
    name = index.get("_class_name")
    pipeline = getattr(diffusers, str(name), None)
    if not inspect.isclass(pipeline) or not hasattr(pipeline, "_optional_components"):
        yield f"{INDEX} names the pipeline {name!r}, which the installed diffusers does not have"
        return
    required, optional = map(set, pipeline._get_signature_keys(pipeline))
    spare = dispensable(pipeline, prompts)
    for part in sorted(required | (optional & index.keys())):
        entry = index.get(part)
        if entry in (None, [None, None]):
            if part in required - spare:
                yield f"{INDEX} names no {part}, without which a {name} can't work"
        elif isinstance(entry, int | float) or (part in optional and not isinstance(entry, list)):
            continue  # an option of the pipeline, no component
        elif not _is_entry(entry):
            yield f"{INDEX} says {entry!r} of the {part}, where [library, class] belongs"
        elif not (folder / part).is_dir():
            yield f"the {part} is listed in {INDEX}, but there is no such folder"
        else:
            partner = index.get(part.replace("tokenizer", "text_encoder"))
            counts = weights and part != without
            for problem in _of_component(folder / part, entry, partner, counts):
                yield f"{part} ({entry[1]}) {problem}"
    for part in sorted(index.keys() - required - optional):
        if _is_entry(index[part]):
            log.warning("%s: a %s has no place for the %s: it is left out", folder, name, part)


def is_packed(folder: Path) -> bool:
    """Whether the folder's transformer says that it is quantized."""
    config = folder / DENOISER / "config.json"
    return config.is_file() and "quantization_config" in read_settings(config)


def absent(folder: Path) -> dict[str, None]:
    """Components that a pipeline goes on without, as from_pretrained wants to be told of them."""
    index = read_settings(folder / INDEX)
    names = [
        part
        for pipeline, parts in DISPENSABLE.items()
        for part in parts
        if str(index.get("_class_name")).startswith(pipeline)
    ]
    return {part: None for part in names if index.get(part) in (None, [None, None])}


def dispensable(pipeline: Any, prompts: bool) -> set[str]:
    """Components that may be null; where texts are to be encoded, what does that may not."""
    spare = set(pipeline._optional_components) - {DENOISER}
    if prompts:
        spare = {part for part in spare if not part.startswith(TEXT)}
    for name, parts in DISPENSABLE.items():
        if pipeline.__name__.startswith(name):
            spare |= set(parts)
    return spare


def read_settings(file: Path) -> dict[str, Any]:
    """A configuration. Raises ConfigError if it is no JSON object or holds NaN."""

    def constant(name: str) -> float:
        if name == "NaN":
            raise ValueError("a value is NaN")
        return float(name)

    try:
        values = json.loads(file.read_text(), parse_constant=constant)
    except FileNotFoundError as error:
        raise ConfigError(f"has no {file.name}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"has a damaged {file.name} ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"has a {file.name} that is no JSON object")
    return values


def mistyped(cls: Any, config: Mapping[str, Any]) -> Iterator[str]:
    """Settings of a diffusers class of another kind than its default: text for a number, say."""
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        default, value = parameter.default, config.get(name)
        if not isinstance(default, int | float) or isinstance(default, bool) or value is None:
            continue
        if isinstance(value, str | dict) or (
            isinstance(value, float) and math.isfinite(default) and not math.isfinite(value)
        ):
            yield f"has {name}: {value!r} in its config, where a number like {default} belongs"


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)


def _of_component(part: Path, entry: list[str], partner: Any, weights: bool) -> Iterator[str]:
    import transformers

    cls = class_named(*entry)
    if cls is None:
        if part.name != DENOISER:  # models/families.py has more to say of that one
            yield f"is a class that {entry[0]} does not have: it needs other code, or a newer one"
        return
    try:
        if issubclass(cls, torch.nn.Module):
            yield from _of_model(cls, part, weights)
        elif issubclass(cls, transformers.PreTrainedTokenizerBase):
            yield from _of_tokenizer(cls, part, _rows(part, partner))
        else:
            yield from _of_other(cls, part, _rows(part, partner))
    except DirotqError as error:
        yield str(error)
    except Exception as error:  # noqa: BLE001  any line of a foreign class
        yield f"can't be made of its folder ({type(error).__name__}: {_short(error)})"


def class_named(library: str, name: str) -> Any:
    """The class of a component as diffusers finds it, or None."""
    from diffusers.pipelines.pipeline_loading_utils import simple_get_class_obj

    try:
        found = simple_get_class_obj(library, name)
    except Exception:  # noqa: BLE001  no such library, no such class, or its import fails
        return None
    return found if inspect.isclass(found) else None


def _of_model(cls: Any, part: Path, weights: bool) -> Iterator[str]:
    config = read_settings(part / "config.json")
    ours = hasattr(cls, "load_config")
    listed = config.get("_class_name", cls.__name__)
    if ours and listed != cls.__name__ and "Legacy" not in str(cls.__mro__):
        yield f"is a {listed} by its config.json: {INDEX} and config.json contradict each other"
        return
    if ours:
        yield from mistyped(cls, config)
    if not weights:
        return
    shapes = stored(weight_files(part, diffusers=ours))
    if deep := too_deep(config, len(shapes)):
        yield f"has {deep} in its config.json, but only {len(shapes)} tensors"
        return
    try:
        found = difference(cls, part, shapes, exact=part.name == DENOISER)
    except Exception as error:  # noqa: BLE001  any line of a foreign class
        yield f"can't be built by its config.json ({type(error).__name__}: {_short(error)})"
        return
    if found:
        yield str(found)


def _of_tokenizer(cls: Any, part: Path, rows: int | None) -> Iterator[str]:
    if lost := missing_files(cls, part):
        yield f"has no {' and no '.join(lost)}"
        return
    read_settings(part / "tokenizer_config.json")
    yield from faults(cls.from_pretrained(part, local_files_only=True), rows)


def _of_other(cls: Any, part: Path, rows: int | None) -> Iterator[str]:
    """Schedulers, processors: what can be made is complete."""
    for file in sorted(part.glob("*config.json")):
        values = read_settings(file)
        if file.name == SCHEDULER:
            yield from mistyped(cls, values)
            yield from _other_scheduler(cls, values)
    made = cls.from_pretrained(part, local_files_only=True)
    if (tokenizer := getattr(made, "tokenizer", None)) is not None:
        yield from faults(tokenizer, rows)


def _other_scheduler(cls: Any, config: Mapping[str, Any]) -> Iterator[str]:
    """Schedulers of one kind read each other's settings: the class of model_index.json counts."""
    import diffusers

    listed = str(config.get("_class_name", cls.__name__))
    known = getattr(diffusers, listed, None)
    if listed != cls.__name__ and known not in getattr(cls, "_get_compatibles", list)():
        yield f"is a {listed} by its config: {INDEX} and {SCHEDULER} contradict each other"


def _rows(part: Path, partner: Any) -> int | None:
    """Rows of the embedding of the encoder that a tokenizer belongs to, as its config says."""
    encoder = part.parent / part.name.replace("tokenizer", "text_encoder")
    cls = class_named(*partner) if _is_entry(partner) and encoder != part else None
    if cls is None or not hasattr(cls, "config_class") or not (encoder / "config.json").is_file():
        return None
    try:
        config = cls.config_class.from_pretrained(encoder, local_files_only=True)
    except Exception:  # noqa: BLE001  said of the encoder itself
        return None
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
