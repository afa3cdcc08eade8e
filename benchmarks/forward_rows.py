"""Rows of `make bench-flux` and `make bench-models`: one number each, appended to a CSV file as
soon as it is known."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FUSED = "ours, fused + CUDA graph"
UNFUSED = "ours, unfused"
W4A8 = "ours W4A8, fused + CUDA graph"
ATTENTION = "ours, with 8-bit attention"
EAGER = "bf16 eager"
COMPILED = "bf16, blocks compiled"
FP8 = "FP8 per row, blocks compiled"
FLOOR = "floor"
CONTESTANTS = (FUSED, UNFUSED, W4A8, ATTENTION, EAGER, COMPILED, FP8)

FOLDER, SYNTHETIC = "folder", "synthetic"
"""Where our packed weights came from: the pipeline's folder, or random ones, which don't count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number of one contestant in one case.

    ``section``  forward (ms of a call), warm (s of the first call, compiled code on disk),
                 image (s of a whole image, and its parts), weights, peak, reserved (GB), error,
                 profile (ms), floor (ms), rate, quality (dB)
    ``case``     such as ``flux 1024x1``: model, side of the image, batch
    ``what``     the category of a profile, a part of the floor, a pair of images
    ``first_s``  seconds of the contestant's first call: compilation, capture of graphs
    ``note``     why there is no value, or what to know about it
    ``run``      when the command began: ratios are taken between rows of one run
    """

    section: str
    case: str
    contestant: str
    what: str = ""
    value: float | None = None
    p20: float | None = None
    p80: float | None = None
    first_s: float | None = None
    weights: str = ""
    note: str = ""
    run: str = ""
    gpu: str = ""
    torch: str = ""
    triton: str = ""
    git: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.section, self.case, self.contestant, self.what

    def __str__(self) -> str:
        spread = "" if self.p20 is None else f" [{self.p20:.4g}, {self.p80:.4g}]"
        value = "-" if self.value is None else f"{self.value:.4g}{spread}"
        first = "" if self.first_s is None else f"first call {self.first_s:.1f} s"
        marks = "; ".join(filter(None, (first, self.weights, self.note)))
        name = f"{self.contestant} {self.what}".strip()
        return f"{self.section:<10}{self.case:<22}{name:<46}{value:<26}{marks}"


def latest(rows: Iterable[Row]) -> list[Row]:
    """Keep of every key the last row of the last run with a value, else the last without.

    Ratios need both sides from one run, so rows of several runs are kept: one per run and key.
    """
    kept: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row.run, *row.key)
        if row.value is not None or key not in kept:
            kept[key] = row
    known = {row.key for row in kept.values() if row.value is not None}
    silent: dict[tuple[str, ...], Row] = {}
    for row in kept.values():
        if row.value is None and row.key not in known:
            silent[row.key] = row
    return [r for r in kept.values() if r.value is not None or silent.get(r.key) is r]


def find(
    rows: Sequence[Row], section: str, case: str, contestant: str, what: str = ""
) -> Row | None:
    """Find the newest row with a value."""
    key = (section, case, contestant, what)
    return next((r for r in reversed(rows) if r.key == key and r.value is not None), None)


def pair(
    rows: Sequence[Row], case: str, ours: str, other: str, section: str = "forward"
) -> tuple[Row, Row] | None:
    """Find two contestants' times in one case, from the newest run that has both."""
    for run in dict.fromkeys(row.run for row in reversed(rows)):
        same = [row for row in rows if row.run == run]
        found = find(same, section, case, ours), find(same, section, case, other)
        if found[0] is not None and found[1] is not None:
            return found[0], found[1]
    return None


def ratio(
    rows: Sequence[Row], case: str, ours: str, other: str, section: str = "forward"
) -> tuple[float, str] | None:
    """Return how many times faster ``ours`` is, and where our weights came from."""
    found = pair(rows, case, ours, other, section)
    if found is None or not found[0].value or found[1].value is None:
        return None
    return found[1].value / found[0].value, found[0].weights
