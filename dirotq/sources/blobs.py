"""Files of a Hugging Face cache: snapshots are links to blobs, named by what they contain.

models--org--name/blobs/<id>                      SHA-256 of large files, git's SHA-1 of small ones
models--org--name/snapshots/<commit>/vae/x.json   -> ../../../blobs/<id>
models--org--name/trees/<commit>.json             the hub's list of the commit's files and ids
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from dirotq.errors import ConfigError
from dirotq.files.digest import content_digest, input_digests

_HOME = re.compile(r"(models|datasets|spaces)--.+")
_ID = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def is_blob(file: Path) -> bool:
    """Tell whether a real path is a blob's: downloaded, and never written to again."""
    blobs = file.parent
    named = blobs.name == "blobs" and _ID.fullmatch(file.name)
    return bool(named and _HOME.fullmatch(blobs.parent.name))


def listing(home: Path, commit: str) -> dict[str, str]:
    """Return {file: id} of a commit as the hub listed it; empty if the cache holds no list.

    home  folder of the repository in the cache
    """
    try:
        files = json.loads((home / "trees" / f"{commit}.json").read_text())["files"]
        ids = {name: entry.get("lfs_sha256") or entry["blob_id"] for name, entry in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
    return ids if all(_ID.fullmatch(str(i)) for i in ids.values()) else {}


def unproven(root: Path, files: Iterable[Path], ids: Mapping[str, str]) -> list[Path]:
    """Hold files of a snapshot against their ids, and return those that have none.

    root  the snapshot
    ids   what :func:`listing` says; without it, the name of the blob that a link leads to

    Raises ConfigError naming the first file whose content has another id.
    """
    wanted: dict[Path, str] = {}
    unknown = []
    for file in files:
        real = file.resolve()
        name = file.relative_to(root).as_posix()
        if (known := ids.get(name) or (real.name if is_blob(real) else None)) is None:
            unknown.append(file)
        else:
            wanted[file] = known
    large = input_digests(file for file, known in wanted.items() if len(known) == 64)
    for file, known in wanted.items():
        if (large[file] if file in large else content_digest(file, "git")) != known:
            real = file.resolve()
            places = f"{file} and {real}" if real != file else str(file)
            raise ConfigError(
                f"the cached download {file} is damaged, or was edited: its content is not the one "
                f"that the hub has under {known[:12]}... Delete {places} and run this again, which "
                "downloads it anew. For an edited model, copy its folder (`cp -rL`) and give that"
            )
    return unknown
