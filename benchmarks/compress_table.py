"""What `make bench-compress` found: figures of a run as JSON, and tables of one run or of two."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.disk import write_json

GOALS = {"capture, basis, gptq": ("capture", "basis", "gptq"), "all": ()}
"""Sums over stages whose gain is told; () stands for all that both runs have."""


class Figures:
    """Figures of one run, in a file that is written after each stage: a kill loses one stage's."""

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        self.file = file
        self.stages: dict[str, dict[str, Any]] = {}
        if file.exists():
            self.stages = json.loads(file.read_text())["stages"]
        self.about = dict(about)

    def begin(self, stage: str, key: str) -> None:
        """Note that a stage begins. If it began before and did not end, it is resumed now."""
        before = self.stages.get(stage, {})
        if before.get("key") != key:
            self.stages[stage] = {"key": key}
        elif "seconds" not in before:
            before["resumed"] = True
        self._write()

    def end(self, artifact: Artifact, seconds: float) -> dict[str, Any]:
        """Note what a stage took; of one that ended in an earlier run, what it took then."""
        past, known = artifact.provenance, self.stages.get(artifact.stage, {})
        took = past["seconds"] if past["seconds"] > seconds else seconds  # cached, or made now
        if known.get("key") == artifact.fingerprint and "seconds" in known:
            took = known["seconds"]
        names = ("peak_vram_bytes", "peak_rss_bytes")
        every = [past, *past.get("workers", [])]
        row = {"seconds": took, "resumed": known.get("resumed", False), "disk": artifact.bytes}
        row |= {"vram": [one.get(names[0], 0) for one in every]}
        row |= {"ram": [one.get(names[1], 0) for one in every]}
        row |= {"told": past.get("estimate", {}), "digest": digest(artifact)}
        self.stages[artifact.stage] = {"key": artifact.fingerprint, **row}
        self._write()
        return row

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"about": self.about, "stages": self.stages})


def digest(artifact: Artifact) -> str:
    """Return the digest of all its files' names and digests: equal if and only if they are."""
    files = {name: entry["sha256"] for name, entry in artifact.manifest["files"].items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def head() -> str:
    """Return the first lines of one run's table, whose rows are :func:`row`."""
    titles = "| stage | seconds | VRAM, GB | told | RAM, GB | told | disk, GB | told |"
    return f"{titles}\n{'|---' * 8}|"


def row(stage: str, found: Mapping[str, Any]) -> str:
    """Return what a stage took beside what was told of it; memory of several processes apart."""
    told = {what: f"{found['told'].get(what, 0) / 1e9:.3g}" for what in ("vram", "ram", "disk")}
    cells = [f"{stage}{' (resumed)' if found['resumed'] else ''}", f"{found['seconds']:.4g}"]
    cells += [_each(found["vram"]), told["vram"], _each(found["ram"]), told["ram"]]
    return f"| {' | '.join([*cells, _each([found['disk']]), told['disk']])} |"


def beside(one: Mapping[str, Any], several: Mapping[str, Any]) -> str:
    """Return the table of two runs, ``{"about": ..., "stages": ...}`` each, stage by stage."""
    runs = one["stages"], several["stages"]
    stages = [s for s in one["about"]["order"] if all("seconds" in run.get(s, {}) for run in runs)]
    lines = [
        f"{one['about']['what']}; {one['about']['machine']}",
        "",
        f"| stage | {one['about']['way']}, s | {several['about']['way']}, s | gain | bytes "
        "| VRAM of each process, GB | RAM of each, GB | RAM of all, GB |",
        "|---" * 8 + "|",
    ]
    for stage in stages:
        pair = one["stages"][stage], several["stages"][stage]
        same = "same" if pair[0]["digest"] == pair[1]["digest"] else "DIFFERENT"
        memory = [_each(pair[1]["vram"]), _each(pair[1]["ram"]), f"{sum(pair[1]['ram']) / 1e9:.3g}"]
        mark = " (resumed)" if pair[0]["resumed"] or pair[1]["resumed"] else ""
        lines.append(
            f"| {stage}{mark} | {_gain(pair[:1], pair[1:])} | {same} | {' | '.join(memory)} |"
        )
    for title, named in GOALS.items():
        chosen = [s for s in stages if s in named or not named]
        sides = [[run["stages"][s] for s in chosen] for run in (one, several)]
        if len(chosen) >= len(named):
            lines.append(f"| {title} | {_gain(*sides)} | | | | |")
    return "\n".join(lines)


def _gain(one: Sequence[Mapping[str, Any]], several: Sequence[Mapping[str, Any]]) -> str:
    before, after = (sum(found["seconds"] for found in side) for side in (one, several))
    return f"{before:.4g} | {after:.4g} | {before / max(after, 1e-9):.2f}x"


def _each(sizes: Sequence[float]) -> str:
    return " + ".join(f"{size / 1e9:.3g}" for size in sizes)
