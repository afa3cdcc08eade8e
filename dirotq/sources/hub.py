"""Repositories of the Hugging Face Hub: an id becomes a commit, a commit a folder of chosen files.

Everything that can go wrong there is a ConfigError that says what to do about it. In the cache
snapshots are links to blobs, named by what they contain:

models--org--name/blobs/<id>                      SHA-256 of large files, git's SHA-1 of small ones
models--org--name/snapshots/<commit>/vae/x.json   -> ../../../blobs/<id>
models--org--name/trees/<commit>.json             the hub's list of the commit's files and ids
"""

import functools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dirotq.errors import ConfigError
from dirotq.files.digest import content_digest, input_digests

log = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]

# org/name, with at most a file inside and a revision: org/name/file.json@revision
_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(?:/(?P<file>[\w][^@]*))?(?:@(?P<revision>[^@\s]+))?")
_COMMIT = re.compile("[0-9a-f]{40}")
_HOME = re.compile(r"(models|datasets|spaces)--.+")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class HubPath:
    """``org/name[/file][@revision]``; the revision (branch, tag, commit) is main unless given."""

    id: str
    file: str | None
    revision: str
    kind: Kind

    @property
    def commit(self) -> str:
        """The commit that the revision is at; without a network, the one that was noted last."""
        return _commit(self.id, self.revision, self.kind, _cache())

    @property
    def url(self) -> str:
        return f"https://huggingface.co/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"

    def fetch(self, patterns: Sequence[str]) -> Path:
        """Return the folder of the commit, with the files that match ``patterns`` downloaded.

        A pattern that matches nothing is passed over. The hub is asked unless the cache holds its
        list of the commit and all files of it that match: a killed download leaves a folder that
        looks like any other. Without a network, and without a list, the folder is taken as it is.

        Raises ConfigError, also when there is no network and the commit was never downloaded.
        """
        from huggingface_hub.utils import filter_repo_objects

        here = self.snapshot
        known = self.listing()
        wanted = filter_repo_objects(known, allow_patterns=list(patterns))
        if known and here.is_dir() and all((here / name).is_file() for name in wanted):
            return here
        return _fetched(self, self.commit, tuple(patterns), _cache())

    @property
    def snapshot(self) -> Path:
        """Where the cache keeps the commit, if it was downloaded. Raises ConfigError."""
        return _home(_cache(), self.kind, self.id) / "snapshots" / self.commit

    def listing(self) -> dict[str, str]:
        """Return {file: id of its content} of the commit; empty if the cache holds no list."""
        file = _home(_cache(), self.kind, self.id) / "trees" / f"{self.commit}.json"
        try:
            files = json.loads(file.read_text())["files"]
            ids = {n: entry.get("lfs_sha256") or entry["blob_id"] for n, entry in files.items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}
        return ids if all(_BLOB.fullmatch(str(i)) for i in ids.values()) else {}

    def download(self, file: str) -> Path:
        """Get one file from the hub, unless it is here already. Raises ConfigError."""
        from huggingface_hub import hf_hub_download

        with explained(self, file):
            return Path(hf_hub_download(self.id, file, repo_type=self.kind, revision=self.commit))

    def identity(self) -> dict[str, str]:
        """Return what stands in a fingerprint in place of digests: repository and commit."""
        return {"repo": self.id, "commit": self.commit}

    def how_to_download(self) -> str:
        """Return the command that makes this source usable without a network."""
        kind = " --repo-type dataset" if self.kind == "dataset" else ""
        file = f" {self.file}" if self.file else ""
        pinned = "" if self.revision == "main" else f" --revision {self.revision}"
        return f"`hf download{kind} {self.id}{file}{pinned}`"


def hub_path(text: str, kind: Kind) -> HubPath | None:
    """Parse ``text`` as a place on the hub; None if it can't be one."""
    match = _ID.fullmatch(text)
    if match is None or match["id"].startswith(".") or ".." in (match["file"] or "").split("/"):
        return None
    return HubPath(match["id"], match["file"], match["revision"] or "main", kind)


def is_blob(file: Path) -> bool:
    """Tell whether a real path is a blob's: downloaded, and never written to again."""
    blobs = file.parent
    named = blobs.name == "blobs" and _BLOB.fullmatch(file.name)
    return bool(named and _HOME.fullmatch(blobs.parent.name))


def unproven(root: Path, files: Iterable[Path], ids: Mapping[str, str]) -> list[Path]:
    """Hold files of a snapshot against their ids, and return those that have none.

    root  the snapshot
    ids   what :meth:`HubPath.listing` says; without it, the name of the blob that a link leads to

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


def _cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


def _home(cache: str, kind: Kind, repo: str) -> Path:
    return Path(cache) / f"{kind}s--{repo.replace('/', '--')}"


@functools.lru_cache(maxsize=256)
def _fetched(place: HubPath, commit: str, patterns: tuple[str, ...], cache: str) -> Path:
    """Ask once per process: a hub that does not answer takes its time."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    here = _home(cache, place.kind, place.id) / "snapshots" / commit
    with explained(place, f"all files matching {', '.join(patterns)}"):
        try:
            folder = huggingface_hub.snapshot_download(
                place.id, repo_type=place.kind, revision=commit, allow_patterns=list(patterns)
            )
        except HfHubHTTPError:
            raise  # the hub answered
        except (HTTPError, ConnectionError):
            # Of a commit, versions 1.28 to 1.33 want the hub's list before they look here.
            if not here.is_dir() or place.listing():
                raise
            return here
    return Path(folder)


@functools.lru_cache(maxsize=256)
def _commit(repo: str, revision: str, kind: Kind, cache: str) -> str:
    if _COMMIT.fullmatch(revision):
        return revision
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    place = HubPath(repo, None, revision, kind)
    noted = _home(cache, kind, repo) / "refs" / revision
    with explained(place, f"the commit of its revision {revision!r}"):
        try:
            hub = huggingface_hub.HfApi()
            return str(hub.repo_info(repo, revision=revision, repo_type=kind, timeout=20).sha)
        except HfHubHTTPError:
            raise  # the hub answered
        except (HTTPError, OSError) as error:
            if not noted.is_file():
                raise
            commit = noted.read_text().strip()
            if not _COMMIT.fullmatch(commit):
                raise  # an empty file, as power loss leaves it
            log.warning(
                "the hub can't be reached (%s): %s@%s is taken to be at commit %s, which was "
                "downloaded before",
                error, repo, revision, commit,
            )  # fmt: skip
            return commit


@contextmanager
def explained(place: HubPath, wanted: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a ConfigError that says what to do."""
    from huggingface_hub import errors

    where = f"{place.kind} {place.id} on the Hugging Face Hub"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{where} is gated: its license has to be accepted first. Open {place.url}, accept it, "
            "and log this machine in with `hf auth login` (or set HF_TOKEN to a token of that "
            "account)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"there is no {where}, or it is private and this machine is not logged in (`hf auth "
            f"login`, or HF_TOKEN); and no file or folder {place.id!r} is found here. Check the "
            f"spelling against {place.url}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(
            f"{where} has no revision {place.revision!r}. Its branches, tags and commits are "
            f"listed at {place.url}/commits/main; leave @{place.revision} out for the newest"
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ConfigError(
            f"{where} has no file {wanted!r} at revision {place.revision!r}; its files are listed "
            f"at {place.url}/tree/{place.revision}"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConfigError(
            f"the Hugging Face Hub refused {wanted} of {place.kind} {place.id} (HTTP "
            f"{error.response.status_code}: {first_line(error)}). Try again later if it is a "
            "server's error (5xx) or a rate limit (429); log in with `hf auth login` if it is 401 "
            "or 403"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError, ConnectionError) as error:
        raise ConfigError(
            f"{where} can't be read: the hub can't be reached ({first_line(error)}), and this "
            f"machine does not hold {wanted}. Connect it, or run {place.how_to_download()} where "
            "there is a network and copy the cache folder (HF_HOME) here; unset HF_HUB_OFFLINE if "
            "it is set by mistake"
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{place.id!r} can't be the id of a repository: {error}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something, cut."""
    return f"{(str(error).strip() or type(error).__name__).splitlines()[0].strip():.300}"
