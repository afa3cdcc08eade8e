"""What was asked of the runtime, and how the rows of `make bench-flux` stand to it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dirotq.benchmarks.forward_rows import (
    COMPILED,
    EAGER,
    FP8,
    FUSED,
    SYNTHETIC,
    W4A8,
    Row,
    find,
    ratio,
)

MAIN = "flux 1024x1"

Found = tuple[float, str] | None
"""A value, and where the packed weights came from; None if it was not measured."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One figure: what it is, how it is read off the rows, and what it should be."""

    what: str
    unit: str
    find: Callable[[Sequence[Row]], Found]
    reach: float
    goal: float | None = None
    less: bool = False
    """Less is better."""

    def verdict(self, found: Found) -> str:
        """Say how a value stands to what was asked; synthetic weights don't count."""
        if found is None:
            return "not measured"
        value, weights = found
        if weights == SYNTHETIC:
            return "synthetic: does not count"
        sign = -1 if self.less else 1
        if self.goal is not None and sign * value >= sign * self.goal:
            return "goal"
        return "reached" if sign * value >= sign * self.reach else "**missed**"

    def wanted(self) -> str:
        sign = "≤" if self.less else "≥"
        goal = "" if self.goal is None else f" / {sign} {self.goal:g}"
        return f"{sign} {self.reach:g}{goal}"

    def line(self, rows: Sequence[Row]) -> str:
        found = self.find(rows)
        value = "" if found is None else f"{found[0]:.3g} {self.unit}".strip()
        return f"| {self.what} | {value} | {self.wanted()} | {self.verdict(found)} |"


def value_of(section: str, case: str, contestant: str, what: str = "") -> Callable:
    """Return what reads one number."""

    def found(rows: Sequence[Row]) -> Found:
        row = find(rows, section, case, contestant, what)
        return None if row is None or row.value is None else (row.value, row.weights)

    return found


def speedup(case: str, other: str, ours: str = FUSED) -> Callable:
    """Return what reads how many times faster ``ours`` is."""
    return lambda rows: ratio(rows, case, ours, other)


def _bytes(other: str) -> Callable:
    """Our weights as a part of another's."""

    def found(rows: Sequence[Row]) -> Found:
        mine = find(rows, "weights", MAIN, FUSED)
        theirs = find(rows, "weights", MAIN, other)
        if mine is None or theirs is None or not theirs.value or mine.value is None:
            return None
        return mine.value / theirs.value, mine.weights

    return found


def _apart(rows: Sequence[Row]) -> Found:
    """By how much W4A8 takes more or less time, in percent."""
    found = ratio(rows, MAIN, W4A8, FUSED)
    return None if found is None else (100 * abs(1 / found[0] - 1), found[1])


def _same_images(rows: Sequence[Row]) -> Found:
    """dB by which the fused path is closer to the unfused one than another batch size is."""
    fused = find(rows, "quality", "tiny_flux", FUSED)
    batch = find(rows, "quality", "tiny_flux", "ours, unfused, batch 8")
    if fused is None or batch is None or fused.value is None or batch.value is None:
        return None
    return fused.value - batch.value, fused.weights


ASKED = (
    Asked("FLUX.1 forward, 1024², batch 1", "ms", value_of("forward", MAIN, FUSED), 90, 76, True),
    Asked("the same against eager bf16", "x", speedup(MAIN, EAGER), 1.9, 2.3),
    Asked("against compiled bf16", "x", speedup(MAIN, COMPILED), 1.45, 1.7),
    Asked("against FP8 per row, compiled", "x", speedup(MAIN, FP8), 1.0, 1.3),
    Asked("its weights, times those of FP8", "x", _bytes(FP8), 0.47, None, True),
    Asked("transformer weights", "GB", value_of("weights", MAIN, FUSED), 6.6, 6.0, True),
    Asked("peak VRAM of a forward, 1024²", "GB", value_of("peak", MAIN, FUSED), 7.6, None, True),
    Asked("W4A8 against W4A4, time apart", "%", _apart, 5, None, True),
    Asked("images: fused closer than batch 8 by", "dB", _same_images, 0),
)  # fmt: skip
