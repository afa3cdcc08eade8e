"""What people say about a scene: captions, and the attributes that a caption promises."""

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dirotq.assets.scenes import (
    BACKGROUNDS,
    CELL,
    COLOR,
    COLOR_1,
    COLOR_2,
    COLORS,
    COUNT,
    KIND,
    POSITIONS,
    SHAPE,
    SHAPES,
    SIZE,
    SIZES,
    sample_side,
    slots,
)

CLIP_LENGTH = 64
T5_LENGTH = 48
"""Tokens of a caption, padding among them."""
_PLACES = {
    "top left": ("at the top left", "in the top left corner"),
    "top": ("at the top", "at the top center"),
    "top right": ("at the top right", "in the top right corner"),
    "left": ("on the left", "on the left side"),
    "center": ("in the center", "in the middle"),
    "right": ("on the right", "on the right side"),
    "bottom left": ("at the bottom left", "in the bottom left corner"),
    "bottom": ("at the bottom", "at the bottom center"),
    "bottom right": ("at the bottom right", "in the bottom right corner"),
}
_SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
_BACKGROUNDS = {
    "plain": ("on a plain {0} background", "on a {0} background", "against plain {0}"),
    "gradient": (
        "on a gradient from {0} to {1}",
        "on a background fading from {0} to {1}",
        "over a gradient from {0} down to {1}",
    ),
    "striped": (
        "on a striped {0} and {1} background",
        "on {0} and {1} stripes",
        "against a background of {0} and {1} stripes",
    ),
    "checkered": (
        "on a checkered {0} and {1} background",
        "on a {0} and {1} checkerboard",
        "against {0} and {1} checkers",
    ),
    "dotted": (
        "on a {0} background with {1} dots",
        "on {0} with {1} dots",
        "against a dotted background, {1} dots on {0}",
    ),
}
_OPENINGS = ("", "", "", "a picture of ", "an image of ", "there is ")


def attributes_of(scene: Tensor) -> dict[str, Any]:
    """Name what is in one scene, int64 [22]: the JSON form that prompt files carry."""
    row = scene.tolist()
    objects = [
        {
            "shape": SHAPES[slot[SHAPE]],
            "color": COLORS[slot[COLOR]],
            "size": SIZES[slot[SIZE]],
            "position": POSITIONS[slot[CELL]],
        }
        for slot in slots(scene[None])[0, : row[COUNT]].tolist()
    ]
    colors = [COLORS[index] for index in (row[COLOR_1], row[COLOR_2]) if index >= 0]
    return {
        "objects": objects,
        "background": {"kind": BACKGROUNDS[row[KIND]], "colors": colors},
    }


def describe(attributes: Mapping[str, Any], rng: random.Random) -> str:
    """One English caption that says exactly `attributes` (the form of `attributes_of`)."""
    things = [
        f"a {rng.choice(_SIZES[thing['size']])} {thing['color']} {thing['shape']} "
        f"{rng.choice(_PLACES[thing['position']])}"
        for thing in attributes["objects"]
    ]
    background = attributes["background"]
    behind = rng.choice(_BACKGROUNDS[background["kind"]]).format(*background["colors"])
    listed = ", ".join(things[:-1]) + (" and " if things[:-1] else "") + things[-1]
    return f"{rng.choice(_OPENINGS)}{listed}{rng.choice((', ', ' '))}{behind}"


def captions_of(scenes: Tensor, seed: int) -> list[str]:
    """Caption scenes [B, 22], phrasing drawn from `seed`."""
    rng = random.Random(seed)
    return [describe(attributes_of(scene), rng) for scene in scenes]


def prompt_rows(count: int, *, heldout: bool, seed: int) -> list[dict[str, Any]]:
    """`count` rows {"prompt", "seed", "attributes"} from one side of the split, all distinct."""
    rng = random.Random(seed)
    scenes = sample_side(2 * count, heldout=heldout, generator=torch.Generator().manual_seed(seed))
    rows: dict[str, dict[str, Any]] = {}
    for scene in scenes:
        attributes = attributes_of(scene)
        prompt = describe(attributes, rng)
        rows.setdefault(prompt, {"prompt": prompt, "seed": len(rows), "attributes": attributes})
    return list(rows.values())[:count]
