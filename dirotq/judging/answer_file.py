"""answers.jsonl: every answer that was paid for, on disk before the next one counts."""

import json
import os
from pathlib import Path
from typing import Any

from dirotq.errors import ArtifactError

Row = dict[str, Any]


class AnswerFile:
    """An append-only JSONL file. A line counts once its newline is on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Row]:
        """Every whole line, in order. A torn last one, as a killed run leaves it, is cut off.

        Raises ArtifactError for a damaged line before the last.
        """
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        lines = data.split(b"\n")
        torn = len(lines.pop())
        rows: list[Row] = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("no JSON object")
            except ValueError as error:
                if number < len(lines):
                    raise ArtifactError(
                        f"{self.path}, line {number}: damaged ({error}); only the last line can be "
                        "torn. Remove the file to ask everything again"
                    ) from error
                torn += len(line) + 1
            else:
                rows.append(row)
        if torn:
            with self.path.open("r+b") as file:
                file.truncate(len(data) - torn)
                os.fsync(file.fileno())
        return rows

    def append(self, row: Row) -> None:
        """Write one line and force it to the disk."""
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
