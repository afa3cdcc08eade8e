"""Artifacts on any fsspec URL, for machines that share no disk.

    <url>/dirotq-remote.json                      marker: the schema of everything below
    <url>/<stage>/<fingerprint>/manifest.json     written last; without it nothing is there
    <url>/<stage>/<fingerprint>/<files>/          data/, provenance.json
    <url>/last-run.json                           {stage: "stage/fingerprint"}, of the last run

``<files>`` is a digest of the manifest's list of files. Two machines that made the same artifact
with other bytes write side by side, and the manifest says whose are read.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dirotq.errors import ArtifactError
from dirotq.pipeline import parcels
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.manifest import (
    MANIFEST,
    SCHEMA,
    DamagedError,
    answers_to,
    json_object,
    manifest_of,
    refuse_newer,
)
from dirotq.pipeline.parcels import Moved, json_bytes
from dirotq.pipeline.place import MARKER, REMOTE_MARKER
from dirotq.pipeline.remote import Remote

LAST = "last-run.json"
PROVENANCE = "provenance.json"
_NAME = re.compile(r"([A-Za-z_]\w*)/([0-9a-f]{16})", re.ASCII)  # becomes a path here


class RemoteStore:
    """Artifacts below one URL: there whole, or not at all."""

    def __init__(self, url: str) -> None:
        """Open it, and look whether this version can read what is there.

        Raises ArtifactError for a URL that can't be opened or read or is a local store's, or if a
        newer DiRotQ wrote it.
        """
        self.remote = Remote(url)
        self.marked = (found := self.remote.read(REMOTE_MARKER)) is not None
        if found is not None:
            where = f"{self.remote}/{REMOTE_MARKER}"
            refuse_newer(json_object(found, where), where)
        elif self.remote.read(MARKER) is not None:
            raise ArtifactError(
                f"{url} is a local store, whose layout is another one: use it with store=FOLDER, "
                "or push to another place"
            )

    def __str__(self) -> str:
        return self.remote.url

    def manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return the manifest of an artifact that is there, else None. Raises DamagedError."""
        name = f"{stage}/{key}/{MANIFEST}"
        if (found := self.remote.read(name)) is None:
            return None
        content = manifest_of(json_object(found, f"{self}/{name}"), f"{self}/{name}")
        if not answers_to(content, stage, key):
            raise DamagedError(
                f"{self}/{name} is damaged: its recipe does not hash to {stage}/{key}. `dirotq "
                f"push --force {stage}/{key} {self}` from a machine that has it mends it"
            )
        return content

    def push(self, artifact: Artifact, *, force: bool = False) -> Moved | None:
        """Copy an artifact there, and return what was moved; None if it is there already.

        force  send every file again, whatever is there: something of it is damaged

        Raises ArtifactError, also if the artifact here is damaged.
        """
        stage, key, manifest = artifact.stage, artifact.fingerprint, artifact.manifest
        if not answers_to(manifest, stage, key):
            raise DamagedError(f"artifact {artifact} is damaged: `dirotq verify` says how")
        if not force and self._has(stage, key):
            return None
        if not self.marked:
            self.remote.write(REMOTE_MARKER, json_bytes({"schema": SCHEMA}))
            self.marked = True
        place = _place(manifest)
        moved = parcels.send(
            self.remote, f"{place}/data", manifest["files"], artifact.file, again=force
        )
        if artifact.provenance:
            self.remote.send(artifact.path / PROVENANCE, f"{place}/{PROVENANCE}")
        self.remote.send(artifact.path / MANIFEST, f"{stage}/{key}/{MANIFEST}")
        parcels.settle(self.remote, f"{place}/data", manifest["files"])
        return moved

    def fill(self, stage: str, key: str, folder: Path) -> Moved | None:
        """Copy an artifact into ``folder`` as it lies in a local store; None if it is not there.

        What an interrupted copy left in ``folder`` is used; every file is held against its digest.
        """
        if (manifest := self.manifest(stage, key)) is None:
            return None
        place = _place(manifest)
        moved = parcels.fetch(self.remote, f"{place}/data", manifest["files"], folder / "data")
        (folder / PROVENANCE).unlink(missing_ok=True)
        if (made := self.remote.read(f"{place}/{PROVENANCE}")) is not None:
            (folder / PROVENANCE).write_bytes(made)
        (folder / MANIFEST).write_bytes(json_bytes(manifest))
        return moved

    def find(self, name: str) -> tuple[str, str]:
        """Find (stage, fingerprint) by ``stage/fingerprint``; either part, or a beginning, may do.

        Raises ArtifactError if none or several match.
        """
        if whole := _NAME.fullmatch(name):
            return whole[1], whole[2]
        stage, _, key = name.rpartition("/")
        stages = [stage] if stage else self.remote.names()
        listed = [(s, k) for s in stages for k in self.remote.names(s)]
        known = [f"{s}/{k}" for s, k in listed if _NAME.fullmatch(f"{s}/{k}")]
        found = [n for n in known if f"/{key}" in n or n.startswith(f"{name}/")]
        if len(found) == 1:
            return self.find(found[0])
        what = "several artifacts match" if found else "no artifact matches"
        told = ", ".join(found or known) or "nothing"
        raise ArtifactError(f"{what} {name!r} in {self}: it is one of {told}")

    def remember(self, artifacts: Mapping[str, str]) -> None:
        """Note which artifacts the last run that was pushed refers to."""
        self.remote.write(LAST, json_bytes({"schema": SCHEMA, "artifacts": dict(artifacts)}))

    def last(self) -> list[str]:
        """List the artifacts of the last run that was pushed. Raises ArtifactError if none was."""
        where = f"{self}/{LAST}"
        if (found := self.remote.read(LAST)) is None:
            raise ArtifactError(
                f"{self} holds no packed folder and no run that was pushed. `dirotq pull {self} "
                "STAGE/FINGERPRINT` fetches one artifact; check the URL"
            )
        content = json_object(found, where)
        refuse_newer(content, where)
        match content.get("artifacts"):
            case dict(names) if all(_NAME.fullmatch(str(name)) for name in names.values()):
                return [str(name) for name in names.values()]
        raise DamagedError(f"{where} is damaged: it names no artifacts. Push the run again")

    def _has(self, stage: str, key: str) -> bool:
        try:
            return self.manifest(stage, key) is not None
        except DamagedError:
            return False  # it is written anew


def _place(manifest: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json_bytes(manifest["files"])).hexdigest()
    return f"{manifest['stage']}/{manifest['fingerprint']}/{digest[:16]}"
