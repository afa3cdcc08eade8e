"""What a diffusers folder could make the libraries do besides reading it: refused beforehand.

diffusers and transformers run code that lies beside weights, fetch kernels that a configuration
names, and unpickle weights whose index names a ``.bin``. Some of it they refuse themselves, with a
traceback, or ask for at the terminal; we refuse all of it, with a sentence.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.files.json_file import read_json
from dirotq.files.names import components, weight_map

INDEX = "model_index.json"
ASIDE = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Adapters within a model's folder, which transformers merges unasked (peft)."""


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
            raise UnsupportedError(
                f"the component {name} of {root} needs code of its own ({INDEX} says it is {cls!r} "
                f"of {library!r}); only components of diffusers and transformers are loaded, and "
                "no code beside weights is run"
            )
        refuse_part(root / name, asks=cls.startswith("Auto"))


def refuse_part(part: Path, *, asks: bool = False) -> None:
    """As :func:`refuse_doors`, of one component: the folder of a model, tokenizer or processor.

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


def _known(library: str) -> bool:
    """diffusers, transformers, or one of diffusers' folders of pipelines ("stable_diffusion")."""
    if library in ("diffusers", "transformers"):
        return True
    spec = importlib.util.find_spec("diffusers")
    places = spec.submodule_search_locations if spec else None
    return library.isidentifier() and any(
        (Path(place) / "pipelines" / library / "__init__.py").is_file() for place in places or ()
    )


def _pairs(values: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [values]
    while waiting:
        match waiting.pop():
            case dict() as inside:
                yield from inside.items()
                waiting += inside.values()
            case list() as inside:
                waiting += inside
