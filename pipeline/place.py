"""Where a store is, or will be: a folder that can be named, however it was given."""

import os
from pathlib import Path

from dirotq.errors import ArtifactError

MARKER, REMOTE_MARKER = "dirotq-store.json", "dirotq-remote.json"
"""Files that say what lies around them: a store (pipeline/store.py) or a remote one
(pipeline/remote_store.py), whose layouts differ."""


def store_place(root: str | Path) -> Path:
    """Return the absolute path of a store; the folder itself may be still to come.

    Raises ArtifactError for nothing at all, for a path through a file, and for a relative one where
    the current folder was removed.
    """
    said = str(root)
    if not said.strip():
        raise ArtifactError(
            "the store has no name: store=, --store or the environment variable DIROTQ_STORE is "
            "empty. Give a folder, or unset DIROTQ_STORE for `artifacts` in the current folder"
        )
    try:
        # As the shell does, where it was not asked to; a ~ of nobody stays what it is.
        place = Path(os.path.abspath(os.path.expanduser(said)))  # noqa: PTH100, PTH111
        above = next(path for path in (place, *place.parents) if os.path.lexists(path))
    except FileNotFoundError as error:
        raise ArtifactError(
            f"the store {said} can't be found: the folder that this was started in does not exist "
            "any more. Change to one that does, or give the store by its full path"
        ) from error
    if not above.is_dir():
        what = "a link to nothing" if above.is_symlink() and not above.exists() else "no folder"
        raise ArtifactError(
            f"the store {place} cannot be written: {above} is {what}. Choose another one with "
            "store=FOLDER or the environment variable DIROTQ_STORE"
        )
    return place
