"""``dirotq list``: the packed models of the store, and how good each is."""

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rich.filesize import decimal

from dirotq.errors import ArtifactError
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.disk import printable
from dirotq.pipeline.housekeeping import store_option
from dirotq.pipeline.store import ArtifactStore

INDEX = "model_index.json"
TITLE = re.compile(r"^# (.+), packed to 4 bits by DiRotQ$", re.MULTILINE)
LORAS = re.compile(r"LoRAs in its weights: (.*)\.")
COLUMNS = ("artifact", "model", "method", "size", "bits", "PSNR")


@dataclass(frozen=True, slots=True)
class Packed:
    """A packed model of a store. What is not known of it is None.

    ``model``   as its card names it
    ``method``  of the plan that it was packed by
    ``bytes``   of the whole folder
    ``bits``    per parameter of the transformer
    ``psnr``    dB to the 16-bit model's images, as the last validation of it says
    """

    artifact: str
    model: str | None
    method: str | None
    bytes: int
    bits: float | None
    psnr: float | None
    path: Path


def add_list(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `list`."""
    store_option(add(_list, "packed models of the store: size, method, score, path", "", "store=F"))


def _list(options: argparse.Namespace) -> int:
    """List the packed models of the store: name, method, size, bits per parameter, PSNR, path."""
    store = ArtifactStore(options.store)
    found = list(packed_models(store))
    if not found:
        print(f"no packed models in {printable(str(store.root))}; `dirotq compress` makes one")
        return 0
    rows = [COLUMNS, *map(_cells, found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    places = ["path", *(str(one.path) for one in found)]
    for cells, place in zip(rows, places, strict=True):
        columns = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print(printable("  ".join([*columns, place])))  # the path last and whole, to be copied
    return 0


def packed_models(store: ArtifactStore) -> Iterator[Packed]:
    """Yield the packed models of ``store``, the oldest first; damaged ones are for `verify`."""
    manifests: dict[str, tuple[Artifact, Mapping[str, Any]]] = {}
    for artifact in store.list():
        try:
            manifests[str(artifact)] = artifact, artifact.manifest
        except ArtifactError:
            continue
    scores: dict[str, float] = {}
    for artifact, manifest in manifests.values():  # by time: the last one counts
        if (psnr := artifact.metrics.get("psnr")) is not None:
            scores |= dict.fromkeys(_inputs(manifest), psnr)
    for name, (artifact, manifest) in manifests.items():
        indexes = [file for file in manifest["files"] if PurePosixPath(file).name == INDEX]
        if not indexes:
            continue
        folder = artifact.data / PurePosixPath(min(indexes, key=len)).parent
        inputs = [manifests[i][1] for i in _inputs(manifest) if i in manifests]
        yield Packed(
            artifact=name,
            model=_model(folder / "README.md"),
            method=next(filter(None, map(_method, inputs)), None),
            bytes=artifact.bytes,
            bits=artifact.metrics.get("bits_per_parameter"),
            psnr=scores.get(name),
            path=folder,
        )


def _cells(one: Packed) -> Sequence[str]:
    bits = "-" if one.bits is None else f"{one.bits:.2f}"
    psnr = "-" if one.psnr is None else f"{one.psnr:.1f} dB"
    return one.artifact, one.model or "-", one.method or "-", decimal(one.bytes), bits, psnr


def _inputs(manifest: Mapping[str, Any]) -> Sequence[str]:
    inputs = manifest["recipe"].get("inputs")
    return [str(name) for name in inputs.values()] if isinstance(inputs, dict) else []


def _method(manifest: Mapping[str, Any]) -> str | None:
    match manifest["recipe"]:
        case {"stage": {"method": {"name": str(name)}}}:
            return name
    return None


def _model(card: Path) -> str | None:
    """Return the model's name, and those of its LoRAs, as a card of ours has them."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    if not (title := TITLE.search(text)):
        return None
    loras = re.findall(r"`([^`]+)`", found[1]) if (found := LORAS.search(text)) else []
    name = " + ".join([title[1], *loras])
    return "".join(letter if letter.isprintable() else "?" for letter in name)  # no escapes
