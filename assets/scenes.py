"""Captioned scenes of simple shapes: what the embedded models are trained on and judged by.

B scenes, O = 3 object slots, S = 9 shapes, L = 128 pixels per side.
A scene is one row of int64, [22]: kind, color, second color of the background (-1 = none),
object count, then per slot: cell (row-major in the 3 x 3 grid), shape, color, size and the
x, y jitter in pixels (-1 in every field of an empty slot; the jitter is not part of a caption).
"""

import math

import torch
from torch import Tensor

SIDE = 128
SHAPES = (
    "circle",
    "square",
    "triangle",
    "ring",
    "cross",
    "diamond",
    "star",
    "heart",
    "crescent",
)
PALETTE = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.62, 0.25),
    "blue": (0.16, 0.32, 0.88),
    "yellow": (0.97, 0.86, 0.16),
    "purple": (0.58, 0.20, 0.74),
    "orange": (0.96, 0.52, 0.08),
    "cyan": (0.16, 0.78, 0.85),
    "white": (0.97, 0.97, 0.97),
    "black": (0.08, 0.08, 0.08),
}
COLORS = tuple(PALETTE)
SIZES = ("small", "large")
POSITIONS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
BACKGROUNDS = ("plain", "gradient", "striped", "checkered", "dotted")
SLOTS = 3
SLOT_FIELDS = 6
KIND, COLOR_1, COLOR_2, COUNT, FIRST_SLOT = range(5)
CELL, SHAPE, COLOR, SIZE, JITTER_X, JITTER_Y = range(SLOT_FIELDS)

_RADIUS = (10.0, 17.0)  # pixels, by size; a large shape plus its jitter stays inside its cell
_JITTER = 2
_MUTING = 0.38  # backgrounds are drawn this much closer to grey, so that objects stand out
_OUTLINE = 1.2  # pixels


def slots(scenes: Tensor) -> Tensor:
    """The object slots of `scenes` int64 [B, 22] as a view [B, 3, 6]."""
    return scenes[:, FIRST_SLOT:].unflatten(1, (SLOTS, SLOT_FIELDS))


def sample_scenes(count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` random scenes on the CPU: int64 [count, 22], both sides of the split."""

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (count, *shape), generator=generator)

    scenes = torch.full((count, FIRST_SLOT + SLOTS * SLOT_FIELDS), -1)
    colors = torch.rand(count, len(COLORS), generator=generator).argsort(1)
    kind = integers(0, len(BACKGROUNDS))
    first, second = colors[:, 0], colors[:, 1]
    # Stripes and checkers look the same with their colors swapped: name them in one order.
    symmetric = (kind == BACKGROUNDS.index("striped")) | (kind == BACKGROUNDS.index("checkered"))
    swap = symmetric & (first > second)
    scenes[:, KIND] = kind
    scenes[:, COLOR_1] = torch.where(swap, second, first)
    scenes[:, COLOR_2] = torch.where(kind == 0, -1, torch.where(swap, first, second))

    number = 1 + torch.multinomial(
        torch.tensor([0.25, 0.4, 0.35]), count, replacement=True, generator=generator
    )
    scenes[:, COUNT] = number
    cells = torch.rand(count, len(POSITIONS), generator=generator).argsort(1)
    objects = torch.stack(
        [
            cells[:, :SLOTS],
            integers(0, len(SHAPES), SLOTS),
            colors.gather(1, integers(2, len(COLORS), SLOTS)),  # never a background color
            integers(0, len(SIZES), SLOTS),
            integers(-_JITTER, _JITTER + 1, SLOTS),
            integers(-_JITTER, _JITTER + 1, SLOTS),
        ],
        dim=2,
    )
    present = torch.arange(SLOTS)[None] < number[:, None]
    slots(scenes).copy_(torch.where(present[..., None], objects, -1))
    return scenes


def _mix(x: Tensor) -> Tensor:
    """Scatter the bits of non-negative int64 values below 2**32 (stays below 2**32)."""
    for multiplier in (73244475, 668265263):
        x = ((x ^ (x >> 15)) * multiplier) & 0xFFFFFFFF
    return x ^ (x >> 16)


def held_out(scenes: Tensor) -> Tensor:
    """Which scenes [B, 22] belong to the held-out sixteenth of the scene space: bool [B].

    Depends on what a caption can say, and not on the jitter or the order of the objects.
    """
    cell, shape, color, size = slots(scenes)[..., :JITTER_X].unbind(-1)
    code = ((cell * len(SHAPES) + shape) * len(COLORS) + color) * len(SIZES) + size + 1
    objects = torch.where(cell >= 0, _mix(code), 0).sum(1)
    kind, first, second = scenes[:, KIND], scenes[:, COLOR_1], scenes[:, COLOR_2]
    background = _mix(10_000 + (kind * 10 + first) * 10 + second + 1)
    return _mix((objects + background) & 0xFFFFFFFF) % 16 == 0


def sample_side(count: int, *, heldout: bool, generator: torch.Generator) -> Tensor:
    """Draw `count` scenes of one side of the split: int64 [count, 22]."""
    found: list[Tensor] = []
    missing = count
    while missing > 0:
        scenes = sample_scenes(missing * (20 if heldout else 2), generator)
        found.append(scenes[held_out(scenes) == heldout][:missing])
        missing -= len(found[-1])
    return torch.cat(found)


def _distances(x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels to every shape, negative inside.

    x, y    float, [B, L, L], offset from the object's center, y grows downwards
    r       float, [B, 1, 1], radius in pixels
    returns float, [B, S, L, L]
    """
    ax, ay = x.abs(), y.abs()
    radius = torch.sqrt(x * x + y * y)

    triangle = torch.maximum(y - 0.75 * r, 0.873 * ax - 0.488 * (y + 0.95 * r))
    bar = torch.maximum(torch.maximum(ax, ay) - r, torch.minimum(ax, ay) - 0.3 * r)
    diamond = torch.maximum((1.3 * ax + ay - r) * 0.61, radius - r)  # keeps the outline short

    # A five-pointed star, folded onto half of one arm: a line from its tip to the inner corner.
    fold = (torch.remainder(torch.atan2(x, -y) + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
    tip, inner = 1.08, 0.46
    dx, dy = tip - inner * math.cos(math.pi / 5), inner * math.sin(math.pi / 5)
    along = (radius * fold.cos() - tip * r) * dy + radius * fold.sin() * dx
    star = torch.maximum(along / math.hypot(dx, dy), radius - r)

    # A heart: two lobes, and below them the wedge that touches both and ends in the tip.
    lobes = torch.sqrt((ax - 0.45 * r) ** 2 + (y + 0.3 * r) ** 2) - 0.52 * r
    wedge = torch.maximum(0.7337 * ax + 0.6794 * (y - 0.95 * r), 0.05 * r - y)
    cleft = torch.maximum(ax - 0.4 * r, (y + 0.1 * r).abs() - 0.2 * r)
    heart = torch.minimum(torch.minimum(lobes, wedge), cleft)

    bite = torch.sqrt((x - 0.5 * r) ** 2 + y * y) - 0.75 * r
    return torch.stack(
        [
            radius - 0.95 * r,
            torch.maximum(ax, ay) - 0.85 * r,
            triangle,
            (radius - 0.75 * r).abs() - 0.25 * r,
            bar,
            diamond,
            star,
            heart,
            torch.maximum(radius - r, -bite),
        ],
        dim=1,
    )


def _backgrounds(scenes: Tensor, palette: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Draw the backgrounds of `scenes`: float [B, 3, L, L] in [0, 1]; x, y [L, L] in pixels."""
    stripes = torch.floor(x / 8) % 2
    checkers = (torch.floor(x / 16) + torch.floor(y / 16)) % 2
    dots = (3.8 - torch.sqrt((x % 16 - 8) ** 2 + (y % 16 - 8) ** 2)).clamp(0, 1)
    blends = torch.stack([torch.zeros_like(x), y / SIDE, stripes, checkers, dots])
    blend = blends[scenes[:, KIND]][:, None]
    muted = palette * (1 - _MUTING) + 0.5 * _MUTING
    first = muted[scenes[:, COLOR_1]][:, :, None, None]
    second = muted[scenes[:, COLOR_2].clamp_min(0)][:, :, None, None]
    return first + (second - first) * blend


def render(scenes: Tensor) -> Tensor:
    """Draw scenes, antialiased, on the device they are on.

    scenes  int64, [B, 22]
    returns float32, [B, 3, 128, 128] in [-1, 1]
    """
    device = scenes.device
    palette = torch.tensor(list(PALETTE.values()), device=device)
    radii = torch.tensor(_RADIUS, device=device)
    pixel = torch.arange(SIDE, device=device) + 0.5
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    images = _backgrounds(scenes, palette, x, y)
    for slot in slots(scenes).unbind(1):
        cell, shape, color, size, jitter_x, jitter_y = slot.clamp_min(-_JITTER).unbind(1)
        center_x = (cell % 3 + 0.5) * (SIDE / 3) + jitter_x
        center_y = (cell.div(3, rounding_mode="floor") + 0.5) * (SIDE / 3) + jitter_y
        distances = _distances(
            x - center_x[:, None, None],
            y - center_y[:, None, None],
            radii[size.clamp_min(0)][:, None, None],
        )
        which = shape.clamp_min(0)[:, None, None, None].expand(-1, 1, SIDE, SIDE)
        distance = distances.gather(1, which)
        present = (cell >= 0)[:, None, None, None]
        images = images * (1 - (0.5 + _OUTLINE - distance).clamp(0, 1) * present)
        ink = (0.5 - distance).clamp(0, 1) * present
        images = images * (1 - ink) + palette[color.clamp_min(0)][:, :, None, None] * ink
    return images * 2 - 1
