"""answers.jsonl: every answer that was paid for, on disk before the next one counts."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

Row = dict[str, Any]


class AnswerFile:
    """An append-only JSONL file. A line counts once it is whole on disk, with its own SHA-256."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Row]:
        """Every intact row, in order.

        Torn and damaged lines are cut out of the file, so that their questions are asked again.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        rows = [_row(line) for line in lines]
        if lost := rows.count(None):
            log.warning("%s: %d damaged answers will be asked for again", self.path, lost)
            kept = [line for line, row in zip(lines, rows, strict=True) if row is not None]
            self._replace(b"".join(kept))
        return [row for row in rows if row is not None]

    def append(self, row: Row) -> None:
        """Write one line and force it to the disk."""
        line = _text(row | {"sha256": _digest(row)}) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def _replace(self, content: bytes) -> None:
        scratch = self.path.with_name(f"{self.path.name}.partial")
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self.path)


def _row(line: bytes) -> Row | None:
    """What one line holds; None if a byte of it is not as it was written."""
    try:
        row = json.loads(line)
        digest = row.pop("sha256")
        whole = digest == _digest(row) and line == (_text(row | {"sha256": digest}) + "\n").encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return row if whole else None


def _digest(row: Row) -> str:
    return hashlib.sha256(_text(row).encode()).hexdigest()


def _text(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False)
