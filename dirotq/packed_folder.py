"""What a packed folder has to be like before diffusers and transformers open anything in it.

Some odd folders cost minutes or gigabytes before there is an error.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dirotq.errors import ArtifactError, ConfigError
from dirotq.json_file import read_json
from dirotq.names import components
from dirotq.pipeline.artifact import MANIFEST, Artifact
from dirotq.pipeline.store import MARKER
from dirotq.sums import SUMS, check_sums

log = logging.getLogger(__name__)

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model"
AGAIN = "download it again, or make it again with `dirotq compress`"
COUNTS = re.compile("layers|blocks|depth|levels")
"""In the names of settings that say how often something is built, mostly."""
MANY = 512
"""Of anything, which costs a second at most; more of it needs as many tensors."""
MOST_STEPS = 1_000_000
"""Largest number in a scheduler's settings: some of them make tables so long."""
TABLES = re.compile("sample_size|pos_embed_max_size")
WIDEST_TABLE = 1024
"""Largest side of a transformer's table of positions, whose area is computed at construction."""


def packed_folder(folder: str | Path, *, verify: bool = True) -> Path:
    """The diffusers folder itself, checked to hold a transformer packed by DiRotQ.

    folder  it, or the artifact of ``pack`` around it
    verify  hold every file that will be read against the digests that lie in it (SHA256SUMS) and
            in the manifest of its artifact

    Raises ArtifactError if the folder holds no packed pipeline, or a file differs.
    """
    root = _place(folder)
    artifact = _artifact_around(root)
    if verify and artifact is not None:
        artifact.tree("model")
    config = root / "transformer" / "config.json"
    if not config.is_file() or not (root / INDEX).is_file():
        raise ArtifactError(
            f"{folder} holds no packed pipeline (no {INDEX} with a transformer/config.json below "
            "it); give the folder that `dirotq compress` printed"
        )
    if verify and not check_sums(root) and artifact is None:
        log.warning(
            "%s has no %s, so its bytes can't be checked: an older DiRotQ packed it, or "
            "save_pretrained wrote it (`python -c \"from dirotq.sums import write_sums; "
            "write_sums('%s')\"` makes one)",
            root, SUMS, root,
        )  # fmt: skip
    packing = read_json(config).get("quantization_config")
    method = packing.get("quant_method") if isinstance(packing, dict) else None
    if method != "dirotq":
        raise ArtifactError(
            f"{folder} is a diffusers pipeline, but its transformer is not packed by DiRotQ "
            f"(quant_method {method!r:.60}); pack it with `dirotq compress model={folder}`"
        )
    return root


def held(folder: str | Path) -> AbstractContextManager[Any]:
    """Keep a folder of a store from being replaced or removed while it is read."""
    artifact = _artifact_around(_place(folder))
    in_store = artifact is not None and (artifact.path.parent.parent / MARKER).is_file()
    return artifact.held() if artifact is not None and in_store else nullcontext()


def refuse_sizes(root: Path) -> None:
    """Look at the headers of a diffusers folder, packed or not, and at how often its settings say
    that something is built.

    Raises ArtifactError naming a weights file that is damaged, or a setting that can't be right;
    ConfigError for settings that are no JSON object.
    """
    for name in components(read_json(root / INDEX)):
        part = root / name
        tensors = sum(count_tensors(file) for file in sorted(part.glob("*.safetensors")))
        for file in sorted(part.glob("*config.json")):
            _check_counts(file, read_json(file), tensors)


def variant_of(root: Path, wanted: str | None) -> str | None:
    """Which files of the transformer to read: None for the plain names, else such as ``fp16``.

    wanted  the variant asked for; None takes the only one there is

    Raises ArtifactError naming those that there are.
    """
    names = [file.name for file in (root / "transformer").glob(f"{WEIGHTS}.*")]
    whole = re.compile(rf"{WEIGHTS}\.(?:([\w-]+?)(?:-\d{{5}}-of-\d{{5}})?\.)?safetensors")
    found = sorted({match[1] or "" for name in names if (match := whole.fullmatch(name))})
    if list((root / "transformer").glob(f"{WEIGHTS}-*-of-*.safetensors")):
        found.insert(0, "")
    if wanted is None and (not found or found[0] == ""):
        return None
    if wanted in found:
        return wanted
    if wanted is None and len(found) == 1:
        return found[0]
    raise ArtifactError(
        f"{root / 'transformer'} holds the weights of "
        f"{', '.join(f'variant={name!r}' if name else 'no variant' for name in found) or 'none'}, "
        f"not of variant={wanted!r:.60}; name one that is there, dirotq.load(folder, variant=...)"
    )


def check_weights(file: str | Path) -> None:
    """Read a safetensors file's header, which says where the file has to end.

    Raises ArtifactError if the header can't be read or the file isn't as long as it says.
    """
    count_tensors(file)


def count_tensors(file: str | Path) -> int:
    """Number of tensors in a safetensors file; raises as :func:`check_weights`."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return len(tensors.keys())
    except SafetensorError as error:
        raise ArtifactError(
            f"{file} is damaged or was not written to its end ({error}); {AGAIN}"
        ) from error
    except OSError as error:
        raise ArtifactError(f"{file} can't be read: {error}") from error


def _place(folder: str | Path) -> Path:
    """The diffusers folder that is meant: this one, or the one in an artifact."""
    try:
        root = Path(folder).expanduser()
        inside = (root / MANIFEST).is_file() and not (root / INDEX).is_file()
    except (TypeError, RuntimeError) as error:  # ~nobody
        raise ConfigError(f"{folder!r:.200} is no path of a folder: {error}") from error
    return root / "data" / "model" if inside else root


def _artifact_around(root: Path) -> Artifact | None:
    """The artifact of ``pack`` whose data/model this is, also through a link."""
    place = root.resolve()
    around = place.parent.parent
    if place.parts[-2:] != ("data", "model") or not (around / MANIFEST).is_file():
        return None
    artifact = Artifact(around.parent.name, around.name, around)
    try:
        manifest = read_json(around / MANIFEST)
    except ConfigError:
        manifest = {}
    # Other people's files have this name too; a damaged one of ours is told by its place.
    return artifact if manifest.get("stage", around.parent.name) == "pack" else None


def _check_counts(file: Path, settings: Mapping[str, Any], tensors: int) -> None:
    """Refuse what would be built more often than there are tensors for, before it is built."""
    for name, value in _settings(settings):
        most, why = None, ""
        if file.name == "scheduler_config.json":
            most, why = MOST_STEPS, "a scheduler's steps"
        elif tensors and COUNTS.search(name):
            most, why = max(tensors, MANY), "what has its tensors beside it"
        elif file.parent.name.startswith("transformer") and TABLES.search(name):
            most, why = WIDEST_TABLE, "any transformer's table of positions"
        if most is not None and isinstance(value, int) and value > most:
            raise ArtifactError(
                f"{file} says {name} = {value}, more than {why} can be ({most}): the file is "
                f"damaged or of another model; {AGAIN}"
            )


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every number of nested settings with its nearest name; a list's length counts as one."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "quantization_config":
                yield from _settings(inner, str(key))
    elif isinstance(value, list):
        yield name, len(value)
        for inner in value:
            yield from _settings(inner, name)
    else:
        yield name, value
