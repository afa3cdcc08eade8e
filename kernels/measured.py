"""Plans that were measured: those shipped in ``plans.json``, and those of the user's own GPUs.

``dirotq tune`` keeps a file per GPU and version of Triton in the user's cache. Of a chip's linear,
rows of this very GPU and shipped ones count alike, by how near their shape is; at the same shape
the GPU's own come first. Rows of another GPU of the same compute capability are borrowed where
there are no others. Letters: M rows, N outputs, K width.
"""

import functools
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .chip import capability, say_once

TABLE = Path(__file__).with_name("plans.json")

Entry = dict[str, Any]
"""A row in a file: m, n, k, the name of the fastest plan and its microseconds."""


class Row(NamedTuple):
    """A measurement: the fastest plan at a shape, and where it was measured."""

    m: int
    n: int
    k: int
    plan: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """One file of the user's: {kind of linear: rows}, and what they were measured on and with.

    ``chip`` is a compute capability (90: 9.0); ``date`` the day of the last row (2026-11-30).
    """

    chip: int
    gpu: str
    driver: str
    triton: str
    torch: str
    date: str
    plans: Mapping[str, list[Entry]]

    @property
    def shapes(self) -> int:
        return sum(len({_shape(row) for row in rows}) for rows in self.plans.values())


@functools.lru_cache
def rows(chip: int, kind: str) -> tuple[Row, ...]:
    """Return what counts for a kind of linear on a chip, what was measured on this GPU first."""
    gpu, found = gpu_of(chip), tuned(chip)
    mine = [
        Row(*_shape(row), row["plan"], "here")
        for table in found if table.gpu == gpu for row in table.plans.get(kind, [])
    ]  # fmt: skip
    mine += [
        Row(*_shape(row), row["plan"], f"on sm_{chip}")
        for row in shipped().get(str(chip), {}).get(kind, [])
    ]
    return tuple(mine) or tuple(
        Row(*_shape(row), row["plan"], f"on another sm_{chip}, {table.gpu}")
        for table in found for row in table.plans.get(kind, [])
    )  # fmt: skip


@functools.lru_cache
def shipped() -> Mapping[str, Mapping[str, list[Entry]]]:
    """Return {compute capability: {kind: rows}} of the package."""
    return json.loads(TABLE.read_text()) if TABLE.is_file() else {}


@functools.lru_cache
def tuned(chip: int) -> tuple[Tuned, ...]:
    """Return the user's tables for a chip: of this GPU first, then of this Triton, then newest.

    A file that can't be read, or holds something else, is said once and passed over. Without a GPU
    of that chip there is nothing to know about it.
    """
    gpu, folder = gpu_of(chip), tuned_folder()
    if gpu is None or folder is None:
        return ()
    found = []
    for file in sorted(folder.glob(f"sm_{chip}-*.json")):
        try:
            found.append(read_tuned(file, chip))
        except (OSError, ValueError) as error:
            say_once(
                f"{file} holds no measured plans and is ignored ({error}); remove it and run "
                "`dirotq tune` again", logging.WARNING,
            )  # fmt: skip
    found.sort(key=lambda t: t.date, reverse=True)
    return tuple(sorted(found, key=lambda t: (t.gpu != gpu, t.triton != triton_version())))


def read_tuned(file: Path, chip: int) -> Tuned:
    """Read a file of the user's. Raises OSError, or ValueError for one of another shape."""
    try:
        value = json.loads(file.read_text())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    kinds = {field.name: dict if field.name == "plans" else field.type for field in fields(Tuned)}
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise ValueError("its fields are not those of a table")
    for name, kind in kinds.items():
        if type(value[name]) is not kind:
            raise ValueError(f"{name} is {value[name]!r:.60}")
    if value["chip"] != chip:
        raise ValueError(f"it is about sm_{value['chip']}, not sm_{chip}")
    for kind, entries in value["plans"].items():
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise ValueError(f"a row of {kind} is no measurement")
    return Tuned(**value)


def tuned_folder() -> Path | None:
    """Return where ``dirotq tune`` keeps plans; None where neither cache nor home is known.

    As ``cache_root`` of dirotq/files/digest.py, of which kernels can't know.
    """
    try:
        return Path(os.environ.get("DIROTQ_CACHE") or "~/.cache/dirotq").expanduser() / "plans"
    except RuntimeError:
        return None


def tuned_name(chip: int, gpu: str, triton: str) -> str:
    """Return the name of a GPU's file: ``sm_89-nvidia-l4-triton-3.6.0.json``."""
    word = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return f"sm_{chip}-{word}-triton-{triton}.json"


@functools.lru_cache
def gpu_of(chip: int) -> str | None:
    """Name the first GPU here of a compute capability; None if there is none.

    Plans are chosen per compute capability: different GPUs of one, in one machine, share the
    first one's.
    """
    for index in range(torch.cuda.device_count()):
        if capability(torch.device("cuda", index)) == chip:
            return torch.cuda.get_device_name(index)
    return None


@functools.lru_cache
def triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "none"


def forget() -> None:
    """Read the files again at the next question: they have changed."""
    for known in (rows, shipped, tuned):
        known.cache_clear()


def _shape(row: Entry) -> tuple[int, int, int]:
    return row["m"], row["n"], row["k"]


def _is_entry(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("plan"), str):
        return False
    return all(type(size := row.get(letter)) is int and size > 0 for letter in "mnk")
