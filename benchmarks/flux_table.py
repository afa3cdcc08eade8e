"""The tables of docs/speed.md, from the rows of `make bench-flux`."""

from collections.abc import Iterable, Iterator, Sequence

from dirotq.benchmarks.flux_verdicts import ASKED, MAIN
from dirotq.benchmarks.forward_rows import (
    COMPILED,
    CONTESTANTS,
    EAGER,
    FP8,
    FUSED,
    SYNTHETIC,
    Row,
    find,
    ratio,
)
from dirotq.benchmarks.kernel_categories import GAPS, NAMES

FLOORS = {"GEMM": ("GEMM",), "attention": ("attention",)}
"""Part of the floor: categories of the profile. What is in neither and no gap answers to bytes."""


def tables(rows: Sequence[Row]) -> str:
    """Write Markdown; a part without rows is left out."""
    parts = (
        ("What was asked", _asked(rows)),
        ("One forward, ms", _forwards(rows)),
        ("Memory, GB", _memory(rows)),
        ("Where the time goes, ms", profiles(rows)),
        ("What separates us from the floor", _floor(rows)),
        ("Results compared, relative error", errors(rows)),
        ("Images of the embedded model", _quality(rows)),
        ("Not measured", silent(rows)),
    )
    return joined(parts, rows)


def joined(parts: Iterable[tuple[str, Iterable[str]]], rows: Sequence[Row]) -> str:
    """Put tables with their titles under one another, and the runs below; none that is empty."""
    text = [
        line for title, body in parts if (lines := list(body))
        for line in (f"### {title}", "", *lines, "")
    ]  # fmt: skip
    return "\n".join([*text, *runs(rows)]) + "\n"


def _asked(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        yield "No row was measured yet."
        return
    yield from head("what", "measured", "reach / goal", "")
    yield from (asked.line(rows) for asked in ASKED)


def _forwards(rows: Sequence[Row]) -> Iterator[str]:
    mine = [row for row in rows if row.section == "forward"]
    if not mine:
        return
    shown = [who for who in CONTESTANTS if any(row.contestant == who for row in mine)]
    against = {EAGER: "x eager", COMPILED: "x compiled", FP8: "x FP8"}
    against = {who: name for who, name in against.items() if who in shown}
    yield from head("case", *shown, *against.values())
    for case in dict.fromkeys(row.case for row in mine):
        times = [time_of(find(rows, "forward", case, who)) for who in shown]
        speed = [ratio(rows, case, FUSED, who) for who in against]
        cells = [*times, *("" if s is None else f"{s[0]:.2f}" for s in speed)]
        yield f"| {case} | {' | '.join(cells)} |"
    firsts = [(who, find(rows, "forward", MAIN, who)) for who in shown]
    told = [
        f"| {who} | {row.first_s:.1f} |" for who, row in firsts if row and row.first_s is not None
    ]
    if told:
        yield ""
        yield from head(f"first call at {MAIN}, compilation and capture included", "s")
        yield from told


def _memory(rows: Sequence[Row]) -> Iterator[str]:
    mine = [row for row in rows if row.section == "peak"]
    if not mine:
        return
    yield from head("case", "contestant", "weights", "workspace, activations", "peak", "reserved")
    for case in dict.fromkeys(row.case for row in mine):
        for who in CONTESTANTS:
            numbers = [find(rows, part, case, who) for part in ("weights", "peak", "reserved")]
            if any(row is None for row in numbers):
                continue
            weights, peak, reserved = (row.value or 0.0 for row in numbers if row is not None)
            sizes = (weights, peak - weights, peak, reserved)
            yield f"| {case} | {who} | " + " | ".join(f"{size:.2f}" for size in sizes) + " |"


def profiles(rows: Sequence[Row]) -> Iterator[str]:
    mine = [row for row in rows if row.section == "profile"]
    columns = list(dict.fromkeys((row.case, row.contestant) for row in mine))
    if not columns:
        return
    yield from head("kernels", *(f"{who}, {case}" for case, who in columns))
    for name in (n for n in NAMES if any(row.what == n for row in mine)):
        found = (find(rows, "profile", case, who, name) for case, who in columns)
        cells = ("" if row is None else f"{row.value:.2f}" for row in found)
        yield f"| {name} | {' | '.join(cells)} |"
    walls = (find(rows, "forward", case, who) for case, who in columns)
    yield f"| **wall time** | {' | '.join('' if w is None else f'{w.value:.2f}' for w in walls)} |"


def _floor(rows: Sequence[Row]) -> Iterator[str]:
    floors = {row.what: row for row in rows if row.section == "floor" and row.value is not None}
    if not floors:
        return
    spent = {
        row.what: row.value
        for row in rows
        if row.section == "profile" and row.key[1:3] == (MAIN, FUSED) and row.value is not None
    }
    ours = {part: sum(spent.get(n, 0.0) for n in names) for part, names in FLOORS.items()}
    ours["bytes"] = sum(spent.values()) - sum(ours.values()) - spent.get(GAPS, 0.0)
    yield from head("part", "floor, ms", "ours, ms", "apart, ms", "floor is")
    for part, mine in ours.items():
        if part in floors:
            least = floors[part].value or 0.0
            cells = ("", "") if not spent else (f"{mine:.2f}", f"{mine - least:.2f}")
            yield f"| {part} | {least:.2f} | {cells[0]} | {cells[1]} | {floors[part].note} |"
    if spent:
        gaps = spent.get(GAPS, 0.0)
        yield f"| {GAPS} | 0 | {gaps:.2f} | {gaps:.2f} | |"
    total = sum(floors[part].value or 0.0 for part in ours if part in floors)
    wall = find(rows, "forward", MAIN, FUSED)
    last = "| |" if wall is None else f"{wall.value:.2f} | {(wall.value or 0.0) - total:.2f} |"
    yield f"| **all** | {total:.2f} | {last} |"
    if shaped := floors.get("GEMM, as shaped"):
        yield ""
        yield (
            f"The products as they are shaped, the protected branch's columns included, take "
            f"{shaped.value:.2f} ms one by one."
        )


def errors(rows: Sequence[Row]) -> Iterator[str]:
    mine = {row.key: row for row in rows if row.section == "error"}
    if not mine:
        return
    yield from head("case", "contestant", "against", "relative error")
    for row in mine.values():
        against = row.what.removeprefix("against ")
        yield f"| {row.case} | {row.contestant} | {against} | {row.value:.2g} |"


def _quality(rows: Sequence[Row]) -> Iterator[str]:
    mine = {row.key: row for row in rows if row.section == "quality" and row.value is not None}
    if not mine:
        return
    yield from head("against ours, unfused, batch 1", "PSNR, dB", "20th, 80th percentile")
    for row in mine.values():
        yield f"| {row.contestant} | {row.value:.2f} | {row.p20:.2f}, {row.p80:.2f} |"


def silent(rows: Sequence[Row]) -> Iterator[str]:
    mine = [row for row in rows if row.value is None]
    if not mine:
        return
    yield from head("case", "contestant", "why")
    for row in mine:
        note = row.note.replace("|", "\\|")
        yield f"| {row.case} | {row.contestant} | {note} |"


def runs(rows: Sequence[Row]) -> Iterator[str]:
    """Say where and when; a run with synthetic weights says so."""
    yield from ("Medians; brackets: 20th and 80th percentile. The runs:", "")
    for run in dict.fromkeys(row.run for row in rows):
        same = [row for row in rows if row.run == run]
        first = same[0]
        synthetic = any(row.weights == SYNTHETIC for row in same)
        yield (
            f"- {first.gpu}; torch {first.torch}, triton {first.triton}; {first.git[:12]}, "
            f"{run} UTC{'; synthetic weights, does not count' if synthetic else ''}"
        )


def time_of(row: Row | None) -> str:
    if row is None or row.value is None:
        return ""
    return f"{row.value:.1f} [{row.p20:.1f}, {row.p80:.1f}]"


def head(*cells: str) -> Iterable[str]:
    return f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"
