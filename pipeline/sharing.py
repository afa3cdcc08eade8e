"""``dirotq push`` and ``dirotq pull``: artifacts and packed folders, to and from any fsspec URL."""

import argparse
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from rich.filesize import decimal

from dirotq.errors import ArtifactError
from dirotq.pipeline import runs
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.disk import printable
from dirotq.pipeline.housekeeping import store_option
from dirotq.pipeline.parcels import Moved
from dirotq.pipeline.remote import Remote
from dirotq.pipeline.remote_folder import listed, pull_folder, push_folder
from dirotq.pipeline.remote_store import RemoteStore
from dirotq.pipeline.store import ArtifactStore
from dirotq.progress import told

log = logging.getLogger(__name__)

INDEX = "model_index.json"
LAST = "last"


def add_push(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `push`."""
    parser = add(
        push, "copy artifacts or a packed folder to a bucket, or another fsspec URL",
        "last s3://BUCKET/store", "pack/1f3a s3://BUCKET/store", "FOLDER s3://BUCKET/models/mine",
    )  # fmt: skip
    parser.add_argument("what", metavar="WHAT", help="STAGE/FINGERPRINT, `last`, a packed folder")
    parser.add_argument("url", metavar="URL", help="of a remote store; of a folder: its own place")
    parser.add_argument(
        "--force", action="store_true", help="send all again: something there is damaged"
    )
    store_option(parser)


def push(options: argparse.Namespace) -> int:
    """Copy an artifact, all artifacts of the last run, or a packed folder to an fsspec URL.

    What arrived there before is not sent again. Whoever pulls gets all of it or nothing.
    """
    with told("dirotq"):
        folder = Path(options.what).expanduser()
        if (folder / INDEX).is_file():
            remote = Remote(options.url)
            with _timed("pushed", str(folder), options.url) as tell:
                tell(push_folder(folder, remote, force=options.force))
            return 0
        if folder.is_dir():
            raise ArtifactError(
                f"{folder} is no packed folder: it has no {INDEX}. Artifacts are named "
                "STAGE/FINGERPRINT, as `dirotq list` shows them"
            )
        store, remote_store = ArtifactStore(options.store), RemoteStore(options.url)
        names = _last_run(store) if options.what == LAST else {}
        chosen = [store.find(name) for name in names.values() or [options.what]]
        for artifact in chosen:
            with artifact.held(), _timed("pushed", str(artifact), options.url) as tell:
                tell(remote_store.push(artifact, force=options.force))
        if names:
            remote_store.remember(names)
    return 0


def add_pull(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `pull`."""
    parser = add(
        pull, "copy artifacts or a packed folder from a bucket, or another fsspec URL",
        "s3://BUCKET/store", "s3://BUCKET/store pack/1f3a", "s3://BUCKET/models/mine --out mine",
    )  # fmt: skip
    parser.add_argument("url", metavar="URL", help="of a remote store, or of a packed folder")
    parser.add_argument(
        "what", nargs="?", metavar="WHAT", help="STAGE/FINGERPRINT (default: the last run pushed)"
    )
    parser.add_argument("--out", metavar="FOLDER", help="of a packed folder (its last name, here)")
    store_option(parser)


def pull(options: argparse.Namespace) -> int:
    """Copy an artifact, or those of the last run that was pushed, from an fsspec URL to the store.

    A packed folder that was pushed there by itself goes to --out. Every file is held against its
    digest; what an interrupted pull left is used.
    """
    with told("dirotq"):
        remote = Remote(options.url)
        content = None if options.what else listed(remote)
        if content is not None:
            out = Path(options.out or PurePosixPath(remote.url).name).expanduser().absolute()
            with _timed("pulled", str(out), options.url) as tell:
                tell(pull_folder(remote, content, out))
            return 0
        if options.out:
            raise ArtifactError(
                f"--out is for a packed folder, and {remote} holds none that was pushed whole; "
                "artifacts go to the store (--store FOLDER)"
            )
        remote_store = RemoteStore(options.url)
        store = ArtifactStore(options.store, remote_store)
        for name in remote_store.last() if options.what in (None, LAST) else [options.what]:
            _pull_one(store, remote_store, *remote_store.find(name))
    return 0


@contextlib.contextmanager
def pushed_too(remote: RemoteStore | None) -> Iterator[Callable[[Artifact], None]]:
    """Give what pushes each artifact of a run to ``remote``, if there is one.

    A push that fails does not end the run: it is told at once, and raised as ArtifactError when the
    run is done.
    """
    names: dict[str, str] = {}
    failed: list[str] = []

    def push_one(artifact: Artifact) -> None:
        if remote is None:
            return
        try:
            with _timed("pushed", str(artifact), str(remote), say=log.info) as tell:
                tell(remote.push(artifact))
        except ArtifactError as error:
            log.warning("%s was not pushed: %s", artifact, error)
            failed.append(f"{artifact}: {error}")
        names[artifact.stage] = str(artifact)

    yield push_one
    if failed:
        raise ArtifactError(
            f"the run is done, but {len(failed)} of {len(names)} artifacts were not pushed to "
            f"{remote}; the same command pushes them. The first: {failed[0]}"
        )
    if remote is not None:
        remote.remember(names)


def _pull_one(store: ArtifactStore, remote: RemoteStore, stage: str, key: str) -> None:
    name = f"{stage}/{key}"
    if store.get(stage, key):
        print(f"there   {name} in {printable(store.root)}")
        return
    with _timed("pulled", name, str(remote)) as tell:
        artifact = store.pull(stage, key)
        if artifact is None:
            raise ArtifactError(
                f"{remote} has no artifact {name}: it was not pushed, or not to its end"
            )
        tell(Moved(artifact.bytes, 0))
    print(f"        {printable(artifact.path)}")


def _last_run(store: ArtifactStore) -> dict[str, str]:
    """Return {stage: artifact} of the last run's record. Raises ArtifactError without one."""
    records = sorted((store.root / "runs").rglob(runs.RECORD))
    if not records:
        raise ArtifactError(f"{store.root} has no run yet: name an artifact (`dirotq list`)")
    names = runs.recorded(records[-1].parent)
    return {name.split("/")[0]: name for name in sorted(names[records[-1]])}


@contextlib.contextmanager
def _timed(
    does: str, what: str, url: str, say: Callable[[str], None] = print
) -> Iterator[Callable[[Moved | None], None]]:
    began = time.monotonic()

    def tell(moved: Moved | None) -> None:
        where = f"{'to' if does == 'pushed' else 'from'} {url}"
        if moved is None:
            say(printable(f"there   {what} at {url}"))
            return
        before = f"; {decimal(moved.there)} had arrived before" if moved.there else ""
        seconds = time.monotonic() - began
        say(printable(f"{does}  {what} {where} ({decimal(moved.sent)} in {seconds:.1f} s{before})"))

    yield tell
