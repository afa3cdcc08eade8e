"""What a diffusers folder could make the libraries do besides reading it: refused beforehand.

diffusers and transformers run code that lies beside weights, fetch kernels that a configuration
names, and unpickle weights whose index names a ``.bin``. Some of it they refuse themselves, with a
traceback, or ask for at the terminal; we refuse all of it, with a sentence. So are settings that
would cost minutes or gigabytes before there is an error.
"""

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dirotq.errors import ArtifactError, ConfigError, UnsupportedError
from dirotq.files.json_file import INDEX, components, read_json, weight_map
from dirotq.pipeline.settings import close_to
from dirotq.sources.weights import AGAIN, read_header

ASIDE = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Adapters within a model's folder, which transformers merges unasked (peft)."""
COUNTS = re.compile("layers|blocks|depth|levels")
"""In the names of settings that say how often something is built, mostly."""
MANY = 512
"""Of anything, which costs a second at most; more of it needs as many tensors."""
MOST_STEPS = 1_000_000
"""Largest number in a scheduler's settings: some of them make tables so long."""
TABLES = re.compile("sample_size|pos_embed_max_size")
WIDEST_TABLE = 1024
"""Largest side of a transformer's table of positions, whose area is computed at construction."""


def refuse_doors(root: Path) -> None:
    """Refuse a pipeline folder that leads its loaders out of plain json and safetensors files.

    Raises ConfigError for names that are paths, weights that are pickles, and configurations that
    fetch something; UnsupportedError for a pipeline or component that needs code of its own.
    """
    index = read_json(root / INDEX)
    if not isinstance(index.get("_class_name"), str):
        raise UnsupportedError(
            f"{root} needs code of its own ({INDEX} says _class_name "
            f"{index.get('_class_name')!r}); only pipelines of diffusers itself are loaded"
        )
    if (stray := root / "None.py").exists():  # diffusers' name for no custom pipeline
        raise UnsupportedError(f"diffusers would run the code in {stray}; remove that file")
    for name, (library, cls) in components(index).items():
        if not (_known(library) and cls.isidentifier()) or (root / name / f"{library}.py").exists():
            hint = close_to(library, ("diffusers", "transformers"))
            raise UnsupportedError(
                f"the component {name} of {root} needs code of its own ({INDEX} says it is {cls!r} "
                f"of {library!r}{hint and f';{hint}'}); only components of diffusers and "
                "transformers are loaded, and no code beside weights is run"
            )
        refuse_part(root / name, asks=cls.startswith("Auto"))


def refuse_part(part: Path, *, asks: bool = False) -> None:
    """Refuse as :func:`refuse_doors` does one component, of a model, tokenizer or processor.

    asks  it is loaded by a class that would ask, at the terminal, whether to run its code
    """
    for index in sorted(part.glob("*.safetensors.index.json")):
        weight_map(index)
    if found := next((file for file in ASIDE if (part / file).exists()), None):
        raise ConfigError(
            f"{part} holds an adapter ({found}), which would change the model without a word. "
            "Merge it into the weights, or remove it; a transformer's LoRAs are given as model.lora"
        )
    for file in sorted(part.glob("*config.json")):
        for key, value in _pairs(read_json(file)):
            remote = asks and key == "auto_map" and value
            kernel = key.endswith("attn_implementation") and "/" in str(value)
            if remote or kernel or key == "transformers_weights":
                raise ConfigError(
                    f"{file} sets {key} to {value!r:.80}: by it code or weights from elsewhere "
                    f"would be loaded. Remove {key} from that file, if the model works without it"
                )


def refuse_sizes(root: Path) -> None:
    """Refuse a folder, packed or not, whose settings build more than its files have tensors for.

    Raises ArtifactError naming a weights file that is damaged, or a setting that can't be right.
    """
    for name in components(read_json(root / INDEX)):
        part = root / name
        tensors = sum(len(read_header(file)) for file in sorted(part.glob("*.safetensors")))
        for file in sorted(part.glob("*config.json")):
            refuse_counts(file, read_json(file), tensors)


def refuse_counts(file: Path, settings: Mapping[str, Any], tensors: int) -> None:
    """Raise ArtifactError for a setting that says more than the ``tensors`` beside it can be.

    The class would be built first and compared then, which takes forever for a million layers.
    """
    for name, value in _pairs(settings):
        most, why = None, ""
        if file.name == "scheduler_config.json":
            most, why = MOST_STEPS, "a scheduler's steps"
        elif tensors and COUNTS.search(name):
            most, why = max(tensors, MANY), "what has its tensors beside it"
        elif file.parent.name.startswith("transformer") and TABLES.search(name):
            most, why = WIDEST_TABLE, "any transformer's table of positions"
        count = len(value) if isinstance(value, list) else value
        if most is not None and isinstance(count, int) and count > most:
            raise ArtifactError(
                f"{file} says {name} = {count}, more than {why} can be ({most}): the file is "
                f"damaged or of another model; {AGAIN}"
            )


def _known(library: str) -> bool:
    """diffusers, transformers, or one of diffusers' folders of pipelines ("stable_diffusion")."""
    if library in ("diffusers", "transformers"):
        return True
    spec = importlib.util.find_spec("diffusers")
    places = spec.submodule_search_locations if spec else None
    return library.isidentifier() and any(
        (Path(place) / "pipelines" / library / "__init__.py").is_file() for place in places or ()
    )


def _pairs(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield every value of nested settings with its nearest name, at any depth."""
    waiting = list(values.items())
    while waiting:
        name, value = waiting.pop()
        yield name, value
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((name, inside) for inside in value)
