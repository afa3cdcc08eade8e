"""Rows of a benchmark as lines of a CSV file, and its tables between the markers of a document."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

from dirotq.pipeline.provenance import git_revision

R = TypeVar("R")


def machine(revision: str | None) -> dict[str, str]:
    """Return where a run measures: the columns that all its rows share."""
    import torch
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "git": revision or git_revision() or "unknown",
    }


def append(path: Path, rows: Iterable[Any]) -> None:
    """Add dataclasses of strings and numbers to a file, with its header if it is new.

    Numbers have five digits. On disk when it returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        for row in rows:
            values = asdict(row)
            writer = csv.DictWriter(file, list(values), lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(
                {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in values.items()}
            )


def read(path: Path, kind: type[R]) -> list[R]:
    """Read what :func:`append` wrote of rows of ``kind``, whose numbers are ``float | None``."""
    numbers = {f.name for f in fields(kind) if f.type == float | None}  # type: ignore[arg-type]
    with path.open(newline="") as file:
        return [
            kind(**{k: (float(v) if v else None) if k in numbers else v for k, v in line.items()})
            for line in csv.DictReader(file)
        ]


def put(document: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of the block ``name`` in a document.

    Raises ValueError if it has none.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = document.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{document} has no {begin} ... {end}; add the two lines where it belongs")
    document.write_text(f"{before}{begin}\n{text}{end}{after}")
