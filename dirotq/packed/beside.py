"""What lies beside the components of a packed pipeline, and how it comes along when one is saved:
card, call (generation.json), licences, digests. diffusers knows of none of them.
"""

import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from dirotq.errors import DirotqError
from dirotq.files.json_file import CALL_FILE, INDEX, read_json
from dirotq.files.sums import write_sums
from dirotq.models.denoisers import denoisers_of, joined, placed
from dirotq.models.families import known_family
from dirotq.models.family import is_linear
from dirotq.packed.card import LARGEST, PAIRS, README, Base, is_ours, renewed, write_card
from dirotq.packed.folder import artifact_around
from dirotq.packed.guards import PACKED, is_packed
from dirotq.packed.swap import footprint
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.place import MARKER
from dirotq.pipeline.store import ArtifactStore
from dirotq.sources.folder import is_licence, stays

log = logging.getLogger(__name__)

SNAPSHOT = re.compile(
    r"(?P<cache>.*)/models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[^/]+)"
)
"""Where huggingface_hub keeps one commit of a repository."""
ATTRIBUTE = "_dirotq_beside"
"""Where a loaded transformer keeps them."""


@dataclass(frozen=True, slots=True)
class Beside:
    """The small files around a transformer when it was loaded: ``texts`` by name, of ``root``."""

    root: Path
    texts: Mapping[str, bytes]


def read_beside(transformer: Path) -> Beside | None:
    """Read what lies around a component's folder; None if that is no pipeline's."""
    root = transformer.resolve().parent
    if not (root / INDEX).is_file():
        return None
    names = [
        p for p in sorted(root.iterdir()) if p.name in (README, CALL_FILE) or is_licence(p.name)
    ]
    inside = [p for p in names if p.is_file() and stays(p, root)]
    small = [p for p in inside if p.stat().st_size <= LARGEST]
    return Beside(root, {p.name: p.read_bytes() for p in small})


def complete(pipe: Any, folder: Path, name: str) -> None:
    """Add to what diffusers saved of a packed pipeline what belongs beside it.

    name  what the card calls it: a folder's name, or an id on the Hub

    Kept as it was loaded, or written anew where there was none. A card that somebody wrote at the
    target stays.
    """
    beside: Beside | None = getattr(pipe.transformer, ATTRIBUTE, None)
    texts = {} if beside is None else {**_left_on_hub(beside), **beside.texts}
    card = texts.pop(README, b"").decode(errors="replace")
    if CALL_FILE not in texts and (family := known_family(type(pipe.transformer).__name__)):
        texts[CALL_FILE] = (json.dumps(dict(family.call), indent=2, sort_keys=True) + "\n").encode()
    for file, content in texts.items():
        (folder / file).write_bytes(content)
    there = folder / README
    if not there.is_file() or is_ours(there.read_text(encoding="utf-8", errors="replace")):
        validated = None if beside is None else _validated(beside.root)
        _write_card(pipe, there, card, name, validated)
    write_sums(folder)


def _left_on_hub(beside: Beside) -> dict[str, bytes]:
    """Fetch card and call of a repository's snapshot: diffusers downloads components alone."""
    match = SNAPSHOT.fullmatch(beside.root.as_posix())
    if match is None:
        return {}
    found, repository = {}, f"{match['org']}/{match['name']}"
    for name in {README, CALL_FILE} - beside.texts.keys():
        try:
            file = hf_hub_download(
                repository, name, revision=match["commit"], cache_dir=Path(match["cache"])
            )
            found[name] = Path(file).read_bytes()
        except (OSError, ValueError, HfHubHTTPError) as error:
            log.warning("%s of %s is written anew: %s", name, repository, error)
    return found


def _write_card(
    pipe: Any, there: Path, card: str, name: str, validated: tuple[Artifact, Any] | None
) -> None:
    call, denoisers = there.with_name(CALL_FILE), denoisers_of(pipe)
    entries = [
        (site, spec)
        for part, one in denoisers.items()
        if is_packed(one)
        for entry, spec in one.hf_quantizer.quantization_config.entries()
        for site in placed([entry], part if len(denoisers) > 1 else "")
    ]
    text = card or card_of(
        joined(denoisers),
        entries,
        name=name,
        base=Base(),
        pipeline=type(pipe).__name__,
        parameters=sum(one.num_parameters() for one in denoisers.values()),
        call=read_json(call) if call.is_file() else {},
    )
    if is_ours(text):
        text = renewed(text, name)
        if validated is not None:
            artifact, report = validated
            if shown := PAIRS in artifact.manifest["files"]:
                there.with_name(PAIRS).write_bytes(artifact.file(PAIRS).read_bytes())
            text = renewed(text, name, report, pairs=shown)
    there.write_text(text, encoding="utf-8")


def card_of(transformer: Any, entries: Any, **facts: Any) -> str:
    """Return a card (:func:`write_card`) with what the packed transformer itself tells."""
    modules = transformer.named_modules()
    kept = [n for n, m in modules if is_linear(m) and not isinstance(m, PACKED)]
    return write_card(
        entries=entries, size=sum(footprint(transformer).values()), kept=kept, **facts
    )


def _validated(root: Path) -> tuple[Artifact, Any] | None:
    """Find the latest artifact of ``validate`` that measured this folder of a store; its report."""
    pack = artifact_around(root)
    if pack is None or not (pack.path.parent.parent / MARKER).is_file():
        return None
    found = None
    for artifact in ArtifactStore(pack.path.parent.parent).list():
        if artifact.stage != "validate":
            continue
        with suppress(DirotqError, KeyError, ValueError):  # damaged: `dirotq verify` says so
            report = json.loads(artifact.file("report.json").read_text())
            found = (artifact, report) if report["inputs"]["pack"] == str(pack) else found
    return found
