"""Rows of `make bench-kernels`: what was measured, as CSV and as the tables of docs/kernels.md."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

TITLES = {
    "linear": "Whole linears, times faster than cuBLAS bf16",
    "gemm": "Product alone (unpack + main term + protected branch + bias), times faster than bf16",
    "transform_quantize": "`transform_quantize`, times its memory traffic",
    "unpack_w4": "`unpack_w4`, times its memory traffic",
    "w4a16": "W4A16 of few rows, times faster than cuBLAS bf16",
    "norm_rope": "`norm_rope` of one block's queries, times its memory traffic",
    "memory": "Bytes of one linear at rest, times bf16",
    "parts": "Where the time goes: leave-one-out, times the whole",
}
LESS_IS_BETTER = ("transform_quantize", "unpack_w4", "norm_rope", "memory", "parts")
OURS = "ours"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contestant in one case. Times are microseconds per call (20th, 50th, 80th percentile).

    ``ratio`` is what ``reach`` and ``stretch`` ask for, see TITLES; None for what it is a ratio to.
    """

    op: str
    case: str
    contestant: str
    plan: str = ""
    us_p20: float | None = None
    us_p50: float | None = None
    us_p80: float | None = None
    ratio: float | None = None
    reach: float | None = None
    stretch: float | None = None
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    git: str = ""
    date: str = ""

    def verdict(self) -> str:
        """Say how the ratio stands to what was asked."""
        if self.ratio is None or self.reach is None:
            return ""
        sign = -1 if self.op in LESS_IS_BETTER else 1
        if self.stretch is not None and sign * self.ratio >= sign * self.stretch:
            return "stretch"
        return "reached" if sign * self.ratio >= sign * self.reach else "**missed**"


def tables(rows: Sequence[Row]) -> str:
    """Write Markdown: a table per op, a line per case, a column per contestant."""
    parts = []
    for op, title in TITLES.items():
        mine = [row for row in rows if row.op == op]
        if mine:
            parts += [f"### {title}", "", *_table(mine), ""]
    if rows:
        first = rows[0]
        parts.append(
            f"{first.gpu}; torch {first.torch}, triton {first.triton}; {first.git[:12]}, "
            f"{first.date}.\nMedians; brackets: 20th and 80th percentile."
        )
    return "\n".join(parts) + "\n"


def _table(rows: Sequence[Row]) -> list[str]:
    others = list(dict.fromkeys(row.contestant for row in rows if row.contestant != OURS))
    timed = any(row.us_p50 is not None for row in rows)
    asked = any(row.reach is not None for row in rows)
    head = ["case", *(["ours, us"] if timed else []), "ours"]
    head += ["reach / stretch", ""] if asked else []
    head += [*others, *(["plan"] if any(row.plan for row in rows) else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case, group in groupby(rows, key=lambda row: row.case):
        by = {row.contestant: row for row in group}
        row = by[OURS]
        cells = [case, *([_time(row)] if timed else []), _ratio(row)]
        if asked:
            wanted = [f"{v:g}" for v in (row.reach, row.stretch) if v is not None]
            cells += [" / ".join(wanted), row.verdict()]
        cells += [_beside(by[name]) if name in by else "" for name in others]
        cells += [row.plan] if "plan" in head else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    return f"{row.ratio:.3f}x" if row.op == "memory" else f"{row.ratio:.2f}x"


def _time(row: Row) -> str:
    if row.us_p50 is None:
        return ""
    if row.us_p20 is None or row.us_p80 is None:
        return f"{row.us_p50:.1f}"
    return f"{row.us_p50:.1f} [{row.us_p20:.1f}, {row.us_p80:.1f}]"


def _beside(row: Row) -> str:
    """Write a contestant in its column: its ratio, or the time that others are a ratio to."""
    if row.ratio is not None:
        return _ratio(row)
    return "" if row.us_p50 is None else f"{row.us_p50:.1f} us"
