"""A packed model folder on any fsspec URL, as it lies on a disk, and a list of its files.

    <url>/...                  the folder's files
    <url>/dirotq-folder.json   {path: sha256, bytes} of all of them, written last

Other programs read such a place as they read the folder; ``pull`` reads what the list says.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dirotq.errors import ArtifactError
from dirotq.files.digest import file_digest
from dirotq.files.sums import SUMS, check_sums, read_sums
from dirotq.pipeline import parcels
from dirotq.pipeline.disk import files_below, open_modes, sync_tree
from dirotq.pipeline.manifest import SCHEMA, DamagedError, json_object, manifest_of, sealed
from dirotq.pipeline.parcels import Moved
from dirotq.pipeline.remote import Remote

LIST = "dirotq-folder.json"


def push_folder(folder: Path, remote: Remote, *, force: bool = False) -> Moved | None:
    """Copy a packed folder to ``remote``; None if it is there already.

    Cards and pictures go along; hidden files, and links that SHA256SUMS does not list, stay.

    Raises ArtifactError if the folder is not what its SHA256SUMS says, or has none.
    """
    if not check_sums(folder):
        raise ArtifactError(
            f"{folder} has no {SUMS}, so nobody could tell whether it arrived. Pack it with this "
            'version of DiRotQ, or list its files: python -c "from dirotq.files.sums import '
            f'write_sums; write_sums({str(folder)!r})"'
        )
    names = {SUMS, *read_sums(folder), *_beside(folder)}
    files = {name: _entry(folder / name) for name in sorted(names)}
    content = sealed({
        "schema": SCHEMA, "stage": "folder", "fingerprint": "", "recipe": {}, "files": files,
        "metrics": {},
    })  # fmt: skip
    with contextlib.suppress(DamagedError):  # it is written anew
        if not force and listed(remote) == content:
            return None
    remote.remove(LIST)  # nobody reads a mixture
    moved = parcels.send(remote, "", files, lambda name: folder / name, again=force)
    remote.write(LIST, parcels.json_bytes(content))
    parcels.settle(remote, "", files)
    return moved


def listed(remote: Remote) -> dict[str, Any] | None:
    """Return the list of a packed folder that is there whole, else None. Raises DamagedError."""
    if (found := remote.read(LIST)) is None:
        return None
    where = f"{remote}/{LIST}"
    return manifest_of(json_object(found, where), where)


def pull_folder(remote: Remote, content: Mapping[str, Any], out: Path) -> Moved:
    """Copy the packed folder that ``content`` lists to ``out``, whole or not at all.

    What an interrupted copy left in ``<out>.pull`` is used. Raises ArtifactError if ``out`` is
    there, for damage, and if another process does the same.
    """
    if os.path.lexists(out):
        raise ArtifactError(f"{out} is there already: remove it, or give another place with --out")
    draft = out.with_name(f"{out.name}.pull")
    draft.mkdir(parents=True, exist_ok=True)
    with _alone(draft):
        moved = parcels.fetch(remote, "", content["files"], draft)
        check_sums(draft)
        open_modes(draft)
        sync_tree(draft)
        draft.rename(out)
    return moved


def _beside(folder: Path) -> Iterator[str]:
    for path in files_below(folder):
        name = path.relative_to(folder)
        plain = path.is_file() and not path.is_symlink() and name.name != LIST
        if plain and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix()


def _entry(path: Path) -> dict[str, Any]:
    return {"sha256": file_digest(path), "bytes": path.stat().st_size}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ArtifactError(f"another process is pulling into {folder}; wait for it") from error
    finally:
        os.close(handle)
