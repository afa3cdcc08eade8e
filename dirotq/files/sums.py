"""SHA256SUMS: digests that lie in a packed folder and travel with it, for ``sha256sum -c`` too.

Listed is what loading reads: model_index.json, generation.json and what lies in the components'
folders. Cards, pictures and licences are left to people; so is whatever else stands beside them.
"""

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path, PurePosixPath

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.files.digest import file_digest
from dirotq.files.json_file import CALL_FILE, INDEX

SUMS = "SHA256SUMS"
TOP = (INDEX, CALL_FILE)
"""What is read of a packed folder itself."""
LARGEST = 16 << 20
"""Bytes of a list; longer ones are none of ours."""
FREE_SUFFIXES = (".md", ".png", ".jpg", ".jpeg", ".webp", ".gif")
FREE_NAMES = ("LICENSE", "LICENCE", "NOTICE", "README", SUMS)
"""Names (or their beginnings, before a dot) in a component's folder that no loader reads."""

_skipped: ContextVar[bool] = ContextVar("sums_skipped", default=False)


@contextmanager
def unchecked() -> Iterator[None]:
    """Let :func:`check_part` pass in this context: who loads has said that it may."""
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def write_sums(folder: str | Path) -> Path:
    """List the files of a packed folder as they now are, in the place of an older list.

    Raises ArtifactError if model_index.json is damaged; UnsupportedError for an odd file name.
    """
    root = Path(folder)
    names = sorted(_read_names(root))
    for name in names:
        if not _inside(name) or (root / name).is_dir():
            raise UnsupportedError(
                f"{name!r} in {root} can't be listed in {SUMS}: it is a link to a folder, or has a "
                "backslash or a control character in its name. Rename it, or copy what it links to"
            )
    lines = [f"{digest}  {name}\n" for name, digest in _digests(root, names).items()]
    (root / SUMS).write_text("".join(lines), encoding="utf-8")
    return root / SUMS


def read_sums(folder: Path) -> dict[str, str]:
    """Return {path relative to the folder: sha256 as hex} of the list in a packed folder.

    Raises ArtifactError if it can't be read, a line is damaged or leads out, or a path comes twice.
    """
    file = folder / SUMS
    try:
        if not file.is_file() or file.stat().st_size > LARGEST:
            raise ValueError(f"it is no plain file of at most {LARGEST >> 20} MB")
        found: dict[str, str] = {}
        for line in file.read_text(encoding="utf-8").split("\n"):
            if not line.strip():
                continue
            match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+?)\r?", line)
            if match is None:
                raise ValueError(f"{line!r:.90} is no line `SHA-256, two spaces, file`")
            name = match[2].removeprefix("./")
            if not _inside(name):
                raise ValueError(f"{name!r:.90} is no path inside of the folder")
            if name in found:
                raise ValueError(f"{name!r:.90} comes twice")
            found[name] = match[1].lower()
        if not found:
            raise ValueError("it lists no file")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} is damaged: {error}. {_what_to_do(folder)}") from error
    return found


def check_sums(folder: Path, part: str = "") -> bool:
    """Hold a packed folder, or one component of it, against its list; False if it has none.

    Raises ArtifactError naming the first file that is gone or differs, or that loading would read
    though it is not listed.
    """
    if not (folder / SUMS).exists() and not (folder / SUMS).is_symlink():
        return False
    listed = {name: digest for name, digest in read_sums(folder).items() if name.startswith(part)}
    _compare(folder, listed)  # model_index.json before it is read
    read = _files_below(folder, folder / part) if part else _read_names(folder)
    if strangers := read - listed.keys():
        raise ArtifactError(
            f"{folder / min(strangers)} would be read, but {SUMS} does not list it. Remove it if "
            f"you don't know it. {_what_to_do(folder)}"
        )
    return True


def check_part(part: Path) -> None:
    """Hold one component's folder against the list beside it, if any, as :func:`check_sums`."""
    if not _skipped.get():
        check_sums(part.parent, f"{part.name}/")


def _compare(folder: Path, listed: dict[str, str]) -> None:
    for name in sorted(listed):
        if not (folder / name).is_file():
            raise ArtifactError(
                f"{folder / name} is missing: {SUMS} lists it. {_what_to_do(folder)}"
            )
    try:
        found = _digests(folder, listed)
    except OSError as error:
        raise ArtifactError(
            f"{folder} can't be read to its end: {error}. Check permissions and the disk"
        ) from error
    for name in sorted(listed):
        if found[name] != listed[name]:
            raise ArtifactError(
                f"{folder / name} changed: its sha256 is {found[name][:12]}..., {SUMS} says "
                f"{listed[name][:12]}.... {_what_to_do(folder)}"
            )


def _digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Hash files, through links; the largest are begun first, so that no thread ends late."""
    ordered = sorted(names, key=lambda name: -(folder / name).stat().st_size)
    with ThreadPoolExecutor() as pool:  # hashlib lets the other threads run
        found = pool.map(file_digest, [folder / name for name in ordered])
        return dict(sorted(zip(ordered, found, strict=True)))


def _read_names(folder: Path) -> set[str]:
    """Return the files that loading may read, relative to the folder."""
    index = folder / INDEX
    try:
        values = json.loads(index.read_text(encoding="utf-8"))
        # [null, null] is a component that is switched off.
        parts = [n for n, value in values.items() if isinstance(value, list) and any(value)]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"{index} is missing or damaged ({error}); download the folder again, or make it again "
            "with `dirotq compress`"
        ) from error
    names = {name for name in TOP if (folder / name).exists()}
    for part in parts:
        if _inside(part) and "/" not in part and (folder / part).is_dir():
            names |= _files_below(folder, folder / part)
    return names


def _files_below(root: Path, folder: Path) -> set[str]:
    """Return what no rule leaves to people, through links to files; a linked folder is one name."""
    inside = (p for p in folder.rglob("*") if not p.is_dir() or p.is_symlink())
    return {p.relative_to(root).as_posix() for p in inside if not _free(p.relative_to(folder))}


def _free(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    named = path.name.split(".")[0].upper() in FREE_NAMES
    return hidden or named or path.suffix.lower() in FREE_SUFFIXES


def _inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and path.as_posix() == name
    return plain and not path.is_absolute() and ".." not in path.parts and name != "."


def _what_to_do(folder: Path) -> str:
    return (
        "Download the folder again, or pack it again with `dirotq compress`. If you changed it on "
        "purpose, dirotq.load(folder, verify=False) takes it as it is, and "
        f"{renewing(folder)} renews the list"
    )


def renewing(folder: Path) -> str:
    """Return the command that writes a folder's list anew, for a shell, in backquotes."""
    place = json.dumps(str(folder), ensure_ascii=False)  # as Python reads it too
    code = f"from dirotq.files.sums import write_sums; write_sums({place})"
    return f"`python -c {shlex.quote(code)}`"
