"""What a component of a pipeline must be, by its kind: a model, a tokenizer, or what is made of
settings alone (schedulers, processors).
"""

import contextlib
import inspect
import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from dirotq.errors import ConfigError, DirotqError
from dirotq.files.json_file import INDEX, read_json
from dirotq.models.installed import installed, is_newer
from dirotq.sources.doors import refuse_counts
from dirotq.sources.expected_tensors import difference
from dirotq.sources.weights import stored, weight_files

log = logging.getLogger(__name__)

SCHEDULER = "scheduler_config.json"
DENOISER = "transformer"
"""In the names of components that denoise (transformer_2, unconditional_transformer)."""
VARIANT = re.compile(r"\.(fp16|bf16|fp32|ema|non_ema)[.-]|-\d+-of-\d+\.")
"""File names of other precisions and of other divisions of the same weights."""
TEXT = "the quick brown fox jumps over the lazy dog, 0123456789"
"""Letters and figures: some of it is known to every vocabulary."""
WHOLE = ("tokenizer.json", "tekken.json", "*.model", "*.tiktoken", "vocab.txt")
"""Files of which one alone holds a vocabulary."""
LEAST_SHARE = 0.5
"""Of the rows of an encoder's embedding: a vocabulary below it belongs to another encoder, or was
lost in part. Embeddings are padded by a few hundred rows, of tens of thousands."""


def is_entry(entry: Any) -> bool:
    """Tell whether a value of model_index.json names a class: [library, class]."""
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)


def problems(part: Path, entry: list[str], partner: Any, *, weights: bool) -> Iterator[str]:
    """Yield what is wrong with a component, as the rest of a sentence that begins with its name.

    part     its folder; ``entry`` its [library, class] in model_index.json
    partner  the entry of the text encoder that belongs to it, if it is a tokenizer
    weights  they are there, and are to be held against the class
    """
    import transformers

    cls = class_named(*entry)
    if cls is None:
        return  # told before (completeness.py, models/families.py)
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
    """Return the class of a component as diffusers finds it, or None (libraries: doors.py)."""
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
    legacy = any(base.__name__ == "LegacyModelMixin" for base in cls.__mro__)  # finds its own class
    if ours and listed != cls.__name__ and not legacy:
        yield f"is a {listed} by its config.json: {INDEX} and config.json contradict each other"
        return
    if ours:
        yield from mistyped(cls, config)
        yield from _unknown_settings(cls, config, part)
    if not weights:
        return
    files = weight_files(part, diffusers=ours)
    yield from _beside(part, files)
    shapes = stored(files)
    refuse_counts(part / "config.json", config, len(shapes))
    try:
        found = difference(cls, part, shapes, exact=DENOISER in part.name)
    except Exception as error:  # noqa: BLE001  any line of a foreign class
        yield f"can't be built by its config.json ({type(error).__name__}: {_short(error)})"
        return
    if found:
        yield found


def _unknown_settings(cls: Any, config: Mapping[str, Any], part: Path) -> Iterator[str]:
    """Name settings that diffusers would leave out: by a newer one they change what is computed.

    Of a folder that no newer one saved, they are leftovers, which the log names.
    """
    known = inspect.signature(cls.__init__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    set_ = {
        name: value
        for name, value in config.items()
        if name not in known and name[0] != "_" and name != "quantization_config"
        if value not in (None, False)
    }
    if not set_:
        return
    shown = ", ".join(f"{name} = {value!r:.40}" for name, value in set_.items())
    if is_newer(config):
        yield (
            f"has settings in its config.json that its class does not know: {shown}, of "
            f"{installed(config)}"
        )
    else:
        log.warning("%s/config.json: a %s has no setting %s", part, cls.__name__, shown)


def _beside(part: Path, files: list[Path]) -> Iterator[str]:
    """Name weights that nobody would read."""
    for file in sorted(set(part.glob("*.safetensors")) - set(files)):
        names: Collection[str] = ()
        with contextlib.suppress(DirotqError):  # whether it is whole is no matter
            names = stored([file]).keys()
        if any(".lora_" in name or ".lora." in name for name in names):
            yield f"has a LoRA beside its weights that is not read: give {file.name} as model.lora"
        elif not VARIANT.search(file.name):
            log.warning("%s is not read", file)


def _of_tokenizer(cls: Any, part: Path, rows: int | None) -> Iterator[str]:
    if lost := _missing_files(cls, part):
        yield f"has no {' and no '.join(lost)}"
        return
    read_settings(part / "tokenizer_config.json")
    yield from _faults(cls.from_pretrained(part, local_files_only=True), rows)


def _missing_files(cls: Any, part: Path) -> list[str]:
    """Name lost files without which the class would make a tokenizer that knows no words."""
    lost = [] if (part / "tokenizer_config.json").is_file() else ["tokenizer_config.json"]
    known = dict(cls.vocab_files_names)
    if not known or any(list(part.glob(pattern)) for pattern in WHOLE):
        return lost  # bytes need no vocabulary (ByT5)
    parts = [file for kind, file in known.items() if kind != "tokenizer_file"]
    here = [file for file in parts if (part / file).is_file()]
    if here and len(here) == len(parts):
        return lost
    apart = f" (or {' and '.join(parts)})" if parts else ""
    return [*lost, f"tokenizer.json{apart}"]


def _faults(tokenizer: Any, rows: int | None) -> Iterator[str]:
    """Name what is wrong with a loaded tokenizer; ``rows`` as of :func:`_rows`."""
    made = tokenizer(TEXT)["input_ids"]
    if len(set(made) - set(tokenizer.all_special_ids)) < 2:
        same = "every prompt becomes the same tokens"
        yield f"knows no words ({same}): its vocabulary is empty or lost"
        return
    if rows is None:
        return
    special = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")
    tokens = {name: getattr(tokenizer, name, None) for name in special}
    over = [f"{name} {t}" for name, t in tokens.items() if t is not None and t >= rows]
    if max(made) >= rows or tokenizer.vocab_size > rows or over:
        what = f" ({', '.join(over)})" if over else ""
        yield (
            f"has a vocabulary of {tokenizer.vocab_size} tokens{what}, its text encoder an "
            f"embedding of {rows} rows: they belong to two models"
        )
    elif len(tokenizer) < LEAST_SHARE * rows:
        yield (
            f"knows {len(tokenizer)} tokens, its text encoder {rows}: its vocabulary was lost in "
            "part, or belongs to another model"
        )


def _of_other(cls: Any, part: Path, rows: int | None) -> Iterator[str]:
    """Make a scheduler or processor: what can be made is complete."""
    for file in sorted(part.glob("*config.json")):
        values = read_settings(file)
        if file.name == SCHEDULER:
            yield from mistyped(cls, values)
            yield from _other_scheduler(cls, values)
    if cls.__name__.startswith("AutoModel") or not hasattr(cls, "from_pretrained"):
        yield f"is no kind of component that {INDEX} can name"
        return
    made = cls.from_pretrained(part, local_files_only=True)
    if (tokenizer := getattr(made, "tokenizer", None)) is not None:
        yield from _faults(tokenizer, rows)


def _other_scheduler(cls: Any, config: Mapping[str, Any]) -> Iterator[str]:
    """Hold a scheduler's class against its settings: the class of model_index.json counts."""
    import diffusers

    listed = str(config.get("_class_name", cls.__name__))
    known = getattr(diffusers, listed, None)
    if listed != cls.__name__ and known not in getattr(cls, "_get_compatibles", list)():
        yield f"is a {listed} by its config: {INDEX} and {SCHEDULER} contradict each other"


def _rows(part: Path, partner: Any) -> int | None:
    """Return the rows of the embedding of a tokenizer's encoder; None where that is unknown."""
    encoder = part.parent / part.name.replace("tokenizer", "text_encoder")
    cls = class_named(*partner) if is_entry(partner) and encoder != part else None
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


def read_settings(file: Path) -> dict[str, Any]:
    """Read a configuration. Raises ConfigError if it is missing, no JSON object or holds NaN."""
    if not file.exists():
        raise ConfigError(f"has no {file.name}")
    return read_json(file)


def mistyped(cls: Any, config: Mapping[str, Any]) -> Iterator[str]:
    """Name settings of a diffusers class of another kind than the default: text for a number."""
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        default, value = parameter.default, config.get(name)
        if not isinstance(default, int | float) or isinstance(default, bool) or value is None:
            continue
        if isinstance(value, str | dict) or (
            isinstance(value, float) and math.isfinite(default) and not math.isfinite(value)
        ):
            yield f"has {name}: {value!r} in its config, where a number like {default} belongs"
