"""answers.jsonl: every answer that was paid for, on disk before the next one counts.

A file of JSON lines that only grows. A line counts once it is whole, with its own SHA-256.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from dirotq.pipeline.disk import sync

log = logging.getLogger(__name__)

Row = dict[str, Any]


def read_answers(path: Path) -> list[Row]:
    """Return every intact row, in order.

    Torn and damaged lines are cut out of the file, so that their questions are asked again.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    rows = [_row(line) for line in lines]
    if lost := rows.count(None):
        log.warning("%s: %d damaged answers will be asked for again", path, lost)
        scratch = path.with_name(f"{path.name}.partial")
        scratch.write_bytes(b"".join(line for line, row in zip(lines, rows) if row is not None))
        sync(scratch)
        scratch.replace(path)
    return [row for row in rows if row is not None]


def append_answer(path: Path, row: Row) -> None:
    """Write one line and force it to the disk."""
    with path.open("ab") as file:
        file.write(_line(row))
    sync(path)


def _row(line: bytes) -> Row | None:
    """Return what one line holds; None if a byte of it is not as it was written."""
    try:
        row = json.loads(line)
        del row["sha256"]
        return row if _line(row) == line else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _line(row: Row) -> bytes:
    digest = hashlib.sha256(_text(row).encode()).hexdigest()
    return (_text(row | {"sha256": digest}) + "\n").encode()


def _text(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False)
