"""Pipelines with another transformer (a single file, fused LoRAs), written once as plain folders.

They lie in $DIROTQ_CACHE/sources under the digest of what they are made of.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.files.digest import cache_root, input_digests
from dirotq.files.json_file import INDEX, read_json
from dirotq.files.walk import walk
from dirotq.pipeline.disk import is_disk_full, open_modes, sync, sync_tree
from dirotq.progress import track

from .folder import missing_weights, place_rest
from .lora import Lora, add, read_lora
from .single_file import converted
from .weights import Weights, plan_shards, write_index

log = logging.getLogger(__name__)

FORMAT = 2  # raise it when the same parts would give another folder
SHARD = 2 * 10**9  # bytes; writing takes twice that in memory
DIGESTS = ".digests.json"
"""{file: SHA-256} of all others of the folder."""
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "BOOL": 1}


def variant_folder(
    base: Path,
    file: Path | None,
    loras: Sequence[Lora],
    identity: Callable[[], Mapping[str, Any]],
    source: str,
) -> Path:
    """Write ``base`` with the transformer of ``file`` (or its own) and ``loras`` added, once.

    identity  what tells this variant from all others, as the disk has it now
    source    its name in errors

    No more than one shard of weights is in memory. A folder in which a byte changed is written
    again. Raises ConfigError, UnsupportedError or NumericalError if the parts don't fit together;
    ConfigError if they change meanwhile, or the cache can't be written.
    """
    parts = identity()
    folder = variant_place(parts)
    sources = folder.parent
    if _intact(folder):
        with suppress(OSError):
            os.utime(folder)  # when it was last used, for `dirotq gc --cache`
        return folder
    with _explained(sources, source):
        sources.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if _intact(folder):  # another process was faster
                return folder
            if folder.exists():
                log.warning("%s is not as it was written, and is written again", folder)
            for left in [folder, *sources.glob(f".{folder.name}-*")]:  # by a process that died
                shutil.rmtree(left, ignore_errors=True)
            draft = sources / f".{folder.name}-{uuid.uuid4().hex[:8]}"
            draft.mkdir()
            try:
                log.info("%s is written to %s, once", source, folder)
                _write_transformer(draft / "transformer", base, file, loras, source)
                place_rest(base, draft)
                (draft / DIGESTS).write_text(json.dumps(_digests(draft), indent=2))
                if identity() != parts:
                    raise ConfigError(
                        f"{source} changed while it was read; run this again once its files stay "
                        "as they are"
                    )
                open_modes(draft)
                sync_tree(draft)
                draft.replace(folder)
                sync(sources)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder


def variant_place(identity: Mapping[str, Any]) -> Path:
    """Return a variant's place in the cache: under the digest of what it is made of."""
    digest = hashlib.sha256(json.dumps([FORMAT, identity], sort_keys=True).encode()).hexdigest()
    return cache_root() / "sources" / digest[:32]


def _intact(folder: Path) -> bool:
    """Tell whether every file that was written is there, no other one, and no byte changed."""
    try:
        return bool(read_json(folder / DIGESTS) == _digests(folder))
    except (ConfigError, OSError):
        return False


def _digests(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in walk(folder)}
    files.pop(DIGESTS, None)
    digests = input_digests(files.values())
    return {name: digests[path] for name, path in files.items()}


@contextmanager
def _explained(sources: Path, source: str) -> Iterator[None]:
    """Explain a full or read-only cache by a ConfigError; other errors stay as they are."""
    remedy = "choose another place for it with the environment variable DIROTQ_CACHE"
    try:
        yield
    except (OSError, SafetensorError) as error:
        if is_disk_full(error):
            raise ConfigError(
                f"the disk is full: {source} could not be written to {sources}. Make room (what "
                f"lies there can be made again), or {remedy}"
            ) from error
        if isinstance(error, OSError) and str(error.filename or "").startswith(str(cache_root())):
            raise ConfigError(
                f"{source} has to be written to {sources} once, which can't be done "
                f"({error.strerror}: {error.filename}); {remedy}"
            ) from error
        raise


def refuse_misfits(base: Path, file: Path | None, loras: Sequence[Lora], source: str) -> None:
    """Raise what :func:`variant_folder` raises for parts that don't fit, without writing them.

    LoRAs of a transformer that is not downloaded yet are held against it later.
    """
    if file is not None or not missing_weights(base / "transformer"):
        _ingredients(base, file, loras, source)


class _Ingredients(NamedTuple):
    """``read`` gives tensors by name; ``sizes`` in bytes; ``updates``: (factor, {module: LoRA})."""

    read: Callable[[list[str]], dict[str, Tensor]]
    sizes: Mapping[str, int]
    updates: list[tuple[float, Any]]


def _ingredients(base: Path, file: Path | None, loras: Sequence[Lora], source: str) -> _Ingredients:
    pipeline = str(read_json(base / INDEX)["_class_name"])
    if file is None:
        weights = Weights(base / "transformer")
        read: Callable[[list[str]], dict[str, Tensor]] = weights.tensors
        shapes = {name: shape for name, (_, shape) in weights.header.items()}
        sizes = {n: math.prod(s) * WIDTHS[dtype] for n, (dtype, s) in weights.header.items()}
    else:
        tensors = converted(file, base / "transformer", source)

        def read(names: list[str]) -> dict[str, Tensor]:
            return {name: tensors[name] for name in names}

        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    updates = [(lora.weight, read_lora(lora, shapes, pipeline)) for lora in loras]
    return _Ingredients(read, sizes, updates)


def _write_transformer(
    target: Path, base: Path, file: Path | None, loras: Sequence[Lora], source: str
) -> None:
    read, sizes, updates = _ingredients(base, file, loras, source)
    target.mkdir()
    shutil.copyfile(base / "transformer" / "config.json", target / "config.json")
    plan = plan_shards(sizes, SHARD)
    for name, inside in track(plan.filename_to_tensors.items(), "model: write"):
        part = read(inside)
        for key in inside:  # one after the other: the shard is never there twice
            module, _, leaf = key.rpartition(".")
            here = [(factor, by[module]) for factor, by in updates if module in by]
            added = add(part[key], here, module) if here and leaf == "weight" else part[key]
            part[key] = added.contiguous()
        save_file(part, target / name, metadata={"format": "pt"})
        shutil.copymode(target / "config.json", target / name)  # safetensors leaves 0600
        del part
    write_index(target, plan)
