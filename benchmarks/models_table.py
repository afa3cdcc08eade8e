"""The tables of docs/speed.md about every model, from the rows of `make bench-models`."""

from collections.abc import Iterator, Mapping, Sequence

from dirotq.benchmarks.flux_table import errors, head, joined, profiles, silent, time_of
from dirotq.benchmarks.flux_verdicts import Asked, Found, speedup, value_of
from dirotq.benchmarks.forward_rows import COMPILED, EAGER, FP8, Row, find, ratio
from dirotq.benchmarks.model_jobs import CASES, CONTESTANTS
from dirotq.benchmarks.ways import (
    ADAPTED,
    EAGER_ADAPTED,
    EAGER_OFFLOADED,
    NO_GRAPHS,
    OFFLOADED,
    PACKED,
    PACKED_ATTENTION,
    PLAIN,
)
from dirotq.benchmarks.whole_images import PARTS

MAIN = (EAGER, COMPILED, FP8, PACKED, PACKED_ATTENTION)
SLOWER: Mapping[str, str] = {
    NO_GRAPHS: EAGER, PLAIN: EAGER, ADAPTED: EAGER_ADAPTED, OFFLOADED: EAGER_OFFLOADED,
}  # fmt: skip
"""What can't replay a graph or wasn't asked to: beside 16 bits in the same position."""


def tables(rows: Sequence[Row]) -> str:
    """Write Markdown; a part without rows is left out."""
    if not rows:
        return "No row was measured yet.\n"
    parts = (
        ("What was asked of every model", _asked(rows)),
        ("One forward of every model, ms", _forwards(rows)),
        ("Without a graph, ms", _slower(rows)),
        ("First calls, s", _firsts(rows)),
        ("Memory of every model, GB", _memory(rows)),
        ("Whole images, s", _images(rows)),
        ("Where the time of every model goes, ms", profiles(rows)),
        ("Results of every model compared, relative error", errors(rows)),
        ("Models not measured", silent(rows)),
    )
    return joined(parts, rows)


def _asked(rows: Sequence[Row]) -> Iterator[str]:
    yield from head("what", "measured", "reach / goal", "")
    yield from (asked.line(rows) for asked in ASKED)


def _forwards(rows: Sequence[Row]) -> Iterator[str]:
    cases = _cases(rows, "forward", MAIN)
    if not cases:
        return
    against = ((EAGER, "x eager"), (COMPILED, "x compiled"), (FP8, "x FP8"))
    faster = (COMPILED, "FP8 attention, x compiled")
    yield from head("case", *MAIN, *(name for _, name in against), faster[1])
    for case in cases:
        times = [time_of(find(rows, "forward", case, who)) for who in MAIN]
        speed = [_times(rows, case, PACKED, who) for who, _ in against]
        last = _times(rows, case, PACKED_ATTENTION, faster[0])
        yield f"| {case} | {' | '.join([*times, *speed, last])} |"


def _slower(rows: Sequence[Row]) -> Iterator[str]:
    cases = _cases(rows, "forward", SLOWER)
    if not cases:
        return
    yield from head("case", "contestant", "ms", "against", "ms", "x")
    for case in cases:
        for who, other in SLOWER.items():
            mine, theirs = (find(rows, "forward", case, name) for name in (who, other))
            if mine is not None:
                cells = (who, time_of(mine), other, time_of(theirs), _times(rows, case, who, other))
                yield f"| {case} | {' | '.join(cells)} |"


def _firsts(rows: Sequence[Row]) -> Iterator[str]:
    shown = [who for who in CONTESTANTS.values() if _cases(rows, "forward", (who,))]
    if not shown:
        return
    warm = [who for who in shown if _cases(rows, "warm", (who,))]
    yield from head("case", *shown, *(f"{who}, again" for who in warm))
    for case in _cases(rows, "forward", shown):
        cold = (find(rows, "forward", case, who) for who in shown)
        cells = ["" if row is None or row.first_s is None else f"{row.first_s:.1f}" for row in cold]
        again = (find(rows, "warm", case, who) for who in warm)
        cells += ["" if row is None else f"{row.value:.1f}" for row in again]
        yield f"| {case} | {' | '.join(cells)} |"


def _memory(rows: Sequence[Row]) -> Iterator[str]:
    shown = [who for who in CONTESTANTS.values() if _cases(rows, "peak", (who,))]
    if not shown:
        return
    yield from head("case: weights, peak", *shown)
    for case in _cases(rows, "peak", shown):
        cells = []
        for who in shown:
            weights, peak = (find(rows, part, case, who) for part in ("weights", "peak"))
            known = weights is not None and peak is not None
            cells.append(f"{weights.value:.2f}, {peak.value:.2f}" if known else "")  # type: ignore[union-attr]
        yield f"| {case} | {' | '.join(cells)} |"


def _images(rows: Sequence[Row]) -> Iterator[str]:
    shown = [who for who in CONTESTANTS.values() if _cases(rows, "image", (who,))]
    if not shown:
        return
    yield from head("case", "contestant", "image", *PARTS, "x eager", "x compiled")
    for case in _cases(rows, "image", shown):
        for who in shown:
            found = [find(rows, "image", case, who, part) for part in ("", *PARTS)]
            cells = ["" if row is None else f"{row.value:.2f}" for row in found]
            for other in (EAGER, COMPILED):
                speed = ratio(rows, case, who, other, "image") if who == PACKED else None
                cells.append("" if speed is None else f"{speed[0]:.2f}")
            yield f"| {case} | {who} | {' | '.join(cells)} |"


def _cases(rows: Sequence[Row], section: str, contestants: Sequence[str] | Mapping) -> list[str]:
    """Return the cases in which one of the contestants has a number: ours in their order first."""
    known = {
        row.case for row in rows
        if row.section == section and row.value is not None and row.contestant in contestants
    }  # fmt: skip
    named = [str(case) for case in CASES.values()]
    return sorted(known, key=lambda case: named.index(case) if case in named else len(named))


def _times(rows: Sequence[Row], case: str, ours: str, other: str) -> str:
    found = ratio(rows, case, ours, other)
    return "" if found is None else f"{found[0]:.2f}"


def _against(name: str, ours: str, other: str, reach: float, goal: float) -> Asked:
    case = str(CASES[name])
    how = {EAGER: "eager", COMPILED: "compiled"}[other]
    what = f"{case}{', FP8 attention' if ours == PACKED_ATTENTION else ''}, against {how}"
    return Asked(what, "x", speedup(case, other, ours), reach, goal)


def _slowest(rows: Sequence[Row]) -> Found:
    """Return what the family gains that gains least without graph and compiler."""
    found = (ratio(rows, str(case), PLAIN, EAGER) for case in CASES.values())
    return min((f for f in found if f is not None), default=None)


def _cold(rows: Sequence[Row]) -> Found:
    """Return the seconds of the first call of a process that finds nothing compiled on disk."""
    row = find(rows, "forward", FLUX, PACKED)
    return None if row is None or row.first_s is None else (row.first_s, row.weights)


FLUX = str(CASES["flux"])
ASKED = (
    _against("flux", PACKED, EAGER, 2.0, 2.15),
    _against("flux", PACKED, COMPILED, 1.5, 1.6),
    _against("flux", PACKED_ATTENTION, EAGER, 2.2, 2.35),
    _against("flux", PACKED_ATTENTION, COMPILED, 1.65, 1.75),
    _against("flux_512", PACKED, COMPILED, 1.4, 1.5),
    _against("flux_2048", PACKED, COMPILED, 1.35, 1.45),
    _against("flux_2048", PACKED_ATTENTION, COMPILED, 1.6, 1.8),
    _against("z_image", PACKED, COMPILED, 1.35, 1.55),
    _against("flux2_klein", PACKED, COMPILED, 1.35, 1.55),
    _against("qwen_image", PACKED, COMPILED, 1.3, 1.5),
    _against("wan", PACKED, COMPILED, 1.2, 1.35),
    _against("pixart_sigma", PACKED, COMPILED, 1.1, 1.3),
    _against("sana", PACKED, COMPILED, 1.3, 2.0),
    _against("sana_x2", PACKED, COMPILED, 1.3, 2.0),
    Asked("the least of all without graph and compiler, against eager", "x", _slowest, 1.0, 1.2),
    Asked("weights of FLUX.1", "GB", value_of("weights", FLUX, PACKED), 6.55, 6.3, True),
    Asked("first call of FLUX.1, nothing compiled on disk", "s", _cold, 40, 20, True),
    Asked("the same, compiled code on disk", "s", value_of("warm", FLUX, PACKED), 5, 2, True),
)  # fmt: skip
