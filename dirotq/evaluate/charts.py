"""Charts as SVG inside of a page: its colours, light or dark, and a name on whatever is hovered.

Lines and dots carry a <title>, which browsers show at the pointer; tables beside the charts have
the same names and numbers for everybody else. Styles are in page.css.j2. On a phone a chart is half
as wide as its units, and its texts are twice as large: the margins leave room for that.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 60, 16, 36, 66
"""Margins of the plot, in the SVG's units: room for labels."""


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) with one name. ``style`` is a class of page.css.j2.

    ``label`` is written below the line's lowest point, where there is room for names.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "a"
    label: str = ""


@dataclass(frozen=True, slots=True)
class Dot:
    """One marked point. ``bar`` is a vertical interval (low, high), if there is one.

    ``label`` is written beside it, or, with ``wordy``, below it and where there is room for names.
    """

    name: str
    x: float
    y: float
    style: str = "a"
    bar: tuple[float, float] | None = None
    label: str = ""
    wordy: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """``title`` says what and in which unit; ``log`` takes powers of ten; ``ticks`` names values
    that numbers can't say.
    """

    title: str
    log: bool = False
    ticks: Sequence[tuple[float, str]] = field(default=())


def chart(
    title: str, x: Axis, y: Axis, *, lines: Sequence[Series] = (), dots: Sequence[Dot] = ()
) -> str:
    """Draw lines and dots. Returns an empty string where there is nothing to draw."""
    points = [point for line in lines for point in line.points] + [(d.x, d.y) for d in dots]
    points += [(d.x, end) for d in dots if d.bar for end in d.bar]
    if not points:
        return ""
    across = _Scale([p[0] for p in points], x.log, LEFT, WIDTH - RIGHT)
    up = _Scale([p[1] for p in points], y.log, HEIGHT - BOTTOM, TOP)
    parts = [*_frame(across, up, x, y)]
    for line in lines:
        path = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in line.points)
        drawn = f'<polyline class="{{}}" points="{path}"/>'
        # The second one is not seen: it makes a thin line easy to point at.
        parts.append(
            f"<g>{_title(line.name)}{drawn.format(f'line {line.style}')}{drawn.format('near')}</g>"
        )
        if line.label:
            parts.append(_name(line.label, *min(line.points, key=lambda p: p[1]), across, up))
    for dot in dots:
        parts += _dot(dot, across, up)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _dot(dot: Dot, across: "_Scale", up: "_Scale") -> Iterator[str]:
    at, height = across(dot.x), up(dot.y)
    if dot.bar:
        low, high = (up(end) for end in dot.bar)
        yield f'<path class="bar" d="M{at:.1f} {low:.1f}V{high:.1f}"/>'
    yield (
        f'<circle class="dot {dot.style}" cx="{at:.1f}" cy="{height:.1f}" r="4">'
        f"{_title(dot.name)}</circle>"
    )
    if dot.wordy and dot.label:
        yield _name(dot.label, dot.x, dot.y, across, up)
    elif dot.label:
        side = _side(at)
        yield _text(dot.label, at + (8 if side == "start" else -8), height - 6, side)


def _name(text: str, x: float, y: float, across: "_Scale", up: "_Scale") -> str:
    return _text(text, across(x), up(y) + 16, _side(across(x)), "name")


def _side(at: float) -> str:
    """Return the end of a text to put here: it goes towards the middle and stays in the chart."""
    return "end" if at > WIDTH / 2 else "start"


def _frame(across: "_Scale", up: "_Scale", x: Axis, y: Axis) -> Iterator[str]:
    base = HEIGHT - BOTTOM
    for value, text in x.ticks or across.ticks():
        yield _text(text, across(value), base + 29)
    for value, text in y.ticks or up.ticks():
        height = up(value)
        yield f'<path class="grid" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>'
        yield _text(text, LEFT - 8, height + 4, "end")
    yield _text(x.title, WIDTH - RIGHT, HEIGHT - 10, "end")
    yield _text(y.title, 0, 18, "start")


def _text(text: str, x: float, y: float, anchor: str = "middle", style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _title(name: str) -> str:
    return f"<title>{escape(name)}</title>"


class _Scale:
    """From values to places in the SVG, with round ticks."""

    def __init__(self, values: Sequence[float], log: bool, start: float, end: float) -> None:
        self.log, self.start, self.end = log, start, end
        low, high = (self._unit(bound) for bound in (min(values), max(values)))
        if low == high:
            low, high = low - 0.5, high + 0.5
        margin = 0.04 * (high - low)
        self.low, self.high = low - margin, high + margin

    def __call__(self, value: float) -> float:
        share = (self._unit(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Return about five round values inside, with their texts."""
        if self.log and self.high - self.low >= 1:
            exponents = range(math.ceil(self.low), math.floor(self.high) + 1)
            shown = exponents[:: max(1, len(exponents) // 5)]
            between = (1, 2, 5) if self.high - self.low < 2.5 else (1,)
            values = [m * 10.0**e for e in (shown[0] - 1, *shown) for m in between]
            inside = [v for v in values if self.low <= math.log10(v) <= self.high]
            return [(v, f"{v:g}") for v in inside]
        low, high = (10.0**b if self.log else b for b in (self.low, self.high))
        step = _round_step((high - low) / 6)
        first, last = math.ceil(low / step), math.floor(high / step)
        return [(n * step, f"{n * step:g}") for n in range(first, last + 1)]

    def _unit(self, value: float) -> float:
        return math.log10(value) if self.log else value


def _round_step(step: float) -> float:
    """Return the next of 1, 2, 5 times a power of ten."""
    power: float = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))
