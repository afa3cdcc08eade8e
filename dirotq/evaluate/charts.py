"""Charts as SVG inside of a page: its colours, light or dark, and a name on whatever is hovered.

Lines and dots carry a <title>, which browsers show at the pointer; tables beside the charts have
the same names and numbers for everybody else. Styles are in page.css.j2.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 44
"""Margins of the plot, in the SVG's units: room for labels."""


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y) with one name. ``style`` is a class of page.css.j2."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "a"


@dataclass(frozen=True, slots=True)
class Dot:
    """One marked point. ``bar`` is a vertical interval (low, high), if there is one."""

    name: str
    x: float
    y: float
    style: str = "a"
    bar: tuple[float, float] | None = None
    label: str = ""


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
        parts.append(
            f'<polyline class="line {line.style}" points="{path}">{_title(line.name)}</polyline>'
        )
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
    if dot.label:
        # Towards the middle, so that no label leaves the chart.
        side = "end" if at > WIDTH / 2 else "start"
        shift = -7 if side == "end" else 7
        yield _text(dot.label, at + shift, height - 6, side)


def _frame(across: "_Scale", up: "_Scale", x: Axis, y: Axis) -> Iterator[str]:
    base, middle = HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    for value, text in x.ticks or across.ticks():
        yield _text(text, across(value), base + 17)
    for value, text in y.ticks or up.ticks():
        height = up(value)
        yield f'<path class="grid" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>'
        yield _text(text, LEFT - 6, height + 4, "end")
    yield _text(x.title, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8)
    yield f'<g transform="rotate(-90 14 {middle})">{_text(y.title, 14, middle)}</g>'


def _text(text: str, x: float, y: float, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


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
            return [(10.0**e, f"{10.0**e:g}") for e in shown]
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
