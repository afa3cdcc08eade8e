"""manifest.json: what an artifact says of itself, and whether it can be taken at its word."""

import hashlib
import json
import re
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from dirotq.errors import ArtifactError, ConfigError
from dirotq.files.digest import file_digest
from dirotq.pipeline.disk import denied, files_below, kind, printable
from dirotq.pipeline.stage import fingerprint
from dirotq.pipeline.units import JOURNAL

SCHEMA = 1  # of manifest.json and of the store's marker; newer ones are refused
MANIFEST = "manifest.json"
_SHAPE = {"stage": str, "fingerprint": str, "recipe": dict, "files": dict, "metrics": dict}
_DIGEST = re.compile("[0-9a-f]{64}")


class DamagedError(ArtifactError):
    """What was read is not what was written. All other reasons not to read it are no damage."""


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in the file ``path``; NaN and infinities are no JSON.

    Raises DamagedError if it is absent or no such file, ArtifactError if it may not be read.
    """
    try:
        # Not opened before it is known: a named pipe would wait for its other end.
        if not stat.S_ISREG(mode := path.lstat().st_mode):
            raise DamagedError(f"{printable(path)} is {kind(mode)}, not a file")
        return json_object(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise DamagedError(f"{printable(path)} does not exist") from error
    except PermissionError as error:
        raise ArtifactError(denied(path)) from error
    except OSError as error:
        raise DamagedError(f"{printable(path)} can't be read: {error.strerror}") from error


def json_object(text: bytes, where: object) -> dict[str, Any]:
    """Parse a JSON object, named ``where`` in errors. Raises DamagedError if it is none."""
    try:
        value = json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{printable(where)} is damaged: no valid JSON ({error})") from error
    if not isinstance(value, dict):
        found = f"{value!r:.40}"
        raise DamagedError(f"{printable(where)} is damaged: expected a JSON object, found {found}")
    return value


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a manifest, of the shape that ``ArtifactStore.create`` writes.

    schema, stage, fingerprint, recipe, files {path below data/: {sha256, bytes}}, metrics, and the
    digest of all these (which manifests of older versions lack)

    Raises DamagedError if it is of another shape, names a file outside of data/ or is not what its
    digest says; ArtifactError if a newer DiRotQ wrote it, or it may not be read.
    """
    return manifest_of(read_json(path), path)


def manifest_of(content: dict[str, Any], where: object) -> dict[str, Any]:
    """Return what was read at ``where`` if it is a manifest; raises as :func:`read_manifest`."""
    refuse_newer(content, where)
    if problem := _problem(content):
        raise DamagedError(f"{printable(where)} is damaged: {printable(problem)}")
    return content


def answers_to(content: Mapping[str, Any], stage: str, key: str) -> bool:
    """Tell whether a manifest is the one of ``stage/key``, and its recipe hashes to that key."""
    try:
        return (content["stage"], fingerprint(content["recipe"])) == (stage, key)
    except ConfigError:  # numbers that no recipe has
        return False


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Add to a manifest the digest of all that it says: nothing else covers its metrics."""
    plain = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return plain | {"digest": hashlib.sha256(text.encode()).hexdigest()}


def refuse_newer(content: dict[str, Any], where: object) -> None:
    """Raise ArtifactError if ``content`` states a schema that this version cannot read."""
    schema = content.get("schema")
    if type(schema) is int and schema > SCHEMA:
        raise ArtifactError(
            f"{where} has schema {schema}, and this DiRotQ reads up to {SCHEMA}: a newer version "
            "wrote it. Upgrade DiRotQ, or use another store (store=FOLDER, or the environment "
            "variable DIROTQ_STORE)"
        )


def inventory(data: Path) -> dict[str, dict[str, Any]]:
    """Return {relative path: {sha256, bytes}} of all files under ``data`` but the journal of units.

    Raises ArtifactError for a link, a pipe, ...: an artifact is files.
    """

    def entry(name: str) -> dict[str, Any]:
        path = data / name
        if not is_file(path):
            found = kind(path.lstat().st_mode)
            raise ArtifactError(f"{printable(path)} is {found}; only files can be published")
        return {"sha256": file_digest(path), "bytes": path.stat().st_size}

    names = [name for name in names_below(data, data) if not name.startswith(f"{JOURNAL}/")]
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL; a Zarr tree is many files
        return dict(zip(names, pool.map(entry, names), strict=True))


def names_below(folder: Path, data: Path) -> list[str]:
    """List paths below ``data`` of all that is in ``folder`` and is no folder."""
    return sorted(path.relative_to(data).as_posix() for path in files_below(folder))


def is_file(path: Path) -> bool:
    """Tell whether there is a file, no link to one. Raises ArtifactError if it may not be seen."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except PermissionError as error:
        raise ArtifactError(denied(path)) from error
    except (OSError, ValueError):
        return False


def _problem(content: dict[str, Any]) -> str | None:
    schema = content.get("schema")
    if type(schema) is not int or schema < 1:
        return f"its schema is {schema!r:.40}, not a number from 1"
    for key, wanted in _SHAPE.items():
        if not isinstance(content.get(key), wanted):
            return f"its {key} is {content.get(key)!r:.40}, not a {wanted.__name__}"
    for name, entry in content["files"].items():
        if not _is_inside(name):
            return f"it names the file {name!r:.80}, which is not a path below data/"
        match entry:
            case {"sha256": str(digest), "bytes": int(size)}:
                if _DIGEST.fullmatch(digest) and size >= 0 and not isinstance(size, bool):
                    continue
        return f"of the file {name!r:.80} it says {entry!r:.80}, not a sha256 and bytes"
    for name, value in content["metrics"].items():
        if not _is_number(value):
            return f"its metric {name!r:.40} is {value!r:.40}, not a number"
    if strange := sorted(content.keys() - _SHAPE.keys() - {"schema", "digest"}):
        return f"it says {strange[0]!r:.40}, which no manifest does"
    if "digest" in content and content != sealed(content):
        return "it was changed after it was written (its digest differs)"
    return None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    plain = path.parts and not path.is_absolute() and ".." not in path.parts and "\0" not in name
    # A lone surrogate can be written in JSON, but in no file name.
    whole = not any("\ud800" <= letter <= "\udfff" for letter in name)
    return bool(plain) and whole and path.as_posix() == name


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 1 << 1023  # larger ones are no float
    return type(value) is float or value in ("inf", "-inf", "nan")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
