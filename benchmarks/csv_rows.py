"""Rows of a benchmark, dataclasses of strings and numbers, as lines of a CSV file."""

import csv
from collections.abc import Collection, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

R = TypeVar("R")


def append_rows(path: Path, kind: type[Any], rows: Iterable[Any], *, digits: int) -> None:
    """Add rows of ``kind`` to a file, with its header if it is new; on disk when it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow(
                {k: f"{v:.{digits}g}" if isinstance(v, float) else v for k, v in values.items()}
            )


def read_rows(path: Path, kind: type[R], numbers: Collection[str]) -> list[R]:
    """Inverse of :func:`append_rows`, up to its digits; ``numbers`` are the fields that are."""
    with path.open(newline="") as file:
        return [
            kind(**{k: (float(v) if v else None) if k in numbers else v for k, v in line.items()})
            for line in csv.DictReader(file)
        ]
