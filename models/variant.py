"""Pipelines with another transformer (a single file, fused LoRAs), written once as plain folders.

They lie in $DIROTQ_CACHE/sources under the digest of what they are made of.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import save_file
from torch import Tensor

from dirotq.digest import cache_root
from dirotq.progress import track

from .lora import Lora, Update, add, read_lora
from .origin import CALL_FILE, INDEX, components, read_header, read_json
from .single_file import converted
from .weights import INDEX as SHARDS
from .weights import WHOLE, Weights

log = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same parts would give another folder
SHARD = 2 * 10**9  # bytes; writing takes twice that in memory
SMALL = 1 << 20
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "BOOL": 1}


def variant_folder(
    base: Path, file: Path | None, loras: Sequence[Lora], identity: Mapping[str, Any], source: str
) -> Path:
    """The folder of ``base`` with the transformer of ``file`` (or its own) and ``loras`` added.

    identity  what tells this variant from all others
    source    its name in errors

    No more than one shard of weights is in memory. Raises ConfigError, UnsupportedError or
    NumericalError if the parts don't fit together.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, identity], sort_keys=True).encode()).hexdigest()
    sources = cache_root() / "sources"
    folder = sources / digest[:32]
    if _intact(folder):
        return folder
    sources.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if _intact(folder):  # another process was faster
            return folder
        for left in [folder, *sources.glob(f".{folder.name}-*")]:  # by a process that died
            shutil.rmtree(left, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=sources))
        try:
            log.info("%s is written to %s, once", source, folder)
            _write_transformer(draft / "transformer", base, file, loras, source)
            _link_rest(base, draft)
            draft.chmod(0o755)
            draft.replace(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """{file: tensor names} in order, no file above ``limit`` bytes unless one tensor is."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {WHOLE: groups[0]}
    stem = WHOLE.removesuffix(".safetensors")
    return {f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, 1)}


def _intact(folder: Path) -> bool:
    """It is there, and no link into another cache has lost its end."""
    return folder.is_dir() and all(path.exists() for path in folder.rglob("*"))


def _write_transformer(
    target: Path, base: Path, file: Path | None, loras: Sequence[Lora], source: str
) -> None:
    pipeline = str(read_json(base / INDEX)["_class_name"])
    if file is None:
        weights = Weights(base / "transformer")
        read: Callable[[list[str]], dict[str, Tensor]] = weights.tensors
        shapes, sizes = _on_disk(weights)
    else:
        tensors = converted(file, base / "transformer", source)

        def read(names: list[str]) -> dict[str, Tensor]:
            return {name: tensors[name] for name in names}

        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    updates = [(lora.weight, read_lora(lora, shapes, pipeline)) for lora in loras]

    target.mkdir()
    shutil.copyfile(base / "transformer" / "config.json", target / "config.json")
    plan = shards(sizes, SHARD)
    for name, inside in track(plan.items(), "model: write"):
        part = read(inside)
        for key in inside:  # one after the other: the shard is never there twice
            part[key] = _added(key, part[key], updates).contiguous()
        save_file(part, target / name, metadata={"format": "pt"})
        del part
    if len(plan) > 1:
        where = {key: name for name, inside in plan.items() for key in inside}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (target / SHARDS).write_text(json.dumps(index, indent=2) + "\n")


def _on_disk(weights: Weights) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """Shapes and bytes of all tensors, from the headers alone."""
    headers = {file: read_header(file) for file in set(weights.files.values())}
    found = {name: headers[file][name] for name, file in weights.files.items()}
    shapes = {name: shape for name, (_, shape) in found.items()}
    return shapes, {n: math.prod(shape) * WIDTHS[dtype] for n, (dtype, shape) in found.items()}


def _added(
    name: str, tensor: Tensor, updates: Sequence[tuple[float, Mapping[str, Update]]]
) -> Tensor:
    module, _, leaf = name.rpartition(".")
    chosen = [(factor, by[module]) for factor, by in updates if leaf == "weight" and module in by]
    return add(tensor, chosen, module) if chosen else tensor


def _link_rest(base: Path, draft: Path) -> None:
    """Everything but the transformer; weights as hard links where that is possible."""
    for file in _rest(base):
        target = draft / file.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        real = file.resolve()
        if real.stat().st_size < SMALL or not _linked(real, target):
            shutil.copyfile(real, target)


def _rest(base: Path) -> Iterator[Path]:
    yield base / INDEX
    if (base / CALL_FILE).is_file():
        yield base / CALL_FILE
    for name in components(read_json(base / INDEX)):
        if name != "transformer" and (base / name).is_dir():
            yield from (path for path in sorted((base / name).iterdir()) if path.is_file())


def _linked(real: Path, target: Path) -> bool:
    for link in (os.link, os.symlink):
        try:
            link(real, target)
        except OSError:
            continue  # another file system, or one without links
        return True
    return False
