"""A caption says exactly what its scene shows."""

import random
import re
from typing import Any

import pytest
import torch

from dirotq.assets.captions import attributes_of, captions_of, describe, prompt_rows
from dirotq.assets.scenes import COLORS, COUNT, SHAPES, sample_scenes

_SIZE_WORDS = {
    "small": "small",
    "little": "small",
    "tiny": "small",
    "large": "large",
    "big": "large",
    "huge": "large",
}
_THING = re.compile(
    rf"a ({'|'.join(_SIZE_WORDS)}) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) "
    r"(?:in|at|on) the ((?:top |bottom )?(?:left|right)|top|bottom|center|middle)"
)
_KIND_WORDS = {
    "gradient": ("gradient", "fading"),
    "striped": ("striped", "stripes"),
    "checkered": ("check",),
    "dotted": ("dots",),
}


def parse(caption: str) -> tuple[list[dict[str, str]], str, list[str]]:
    """Read a caption back with a grammar of its own: objects, background kind and its words."""
    things = [
        {
            "shape": shape,
            "color": color,
            "size": _SIZE_WORDS[size],
            "position": "center" if place == "middle" else place,
        }
        for size, color, shape, place in _THING.findall(caption)
    ]
    behind = caption[list(_THING.finditer(caption))[-1].end() :]
    kinds = [k for k, words in _KIND_WORDS.items() if any(word in behind for word in words)]
    return things, (kinds or ["plain"])[0], re.findall(rf"\b({'|'.join(COLORS)})\b", behind)


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    return sample_scenes(400, torch.Generator().manual_seed(11))


def test_captions_say_what_the_attributes_say(scenes: torch.Tensor) -> None:
    for scene, caption in zip(scenes, captions_of(scenes, seed=1), strict=True):
        attributes = attributes_of(scene)
        things, kind, colors = parse(caption)
        assert things == attributes["objects"], caption
        assert len(things) == scene[COUNT]
        assert kind == attributes["background"]["kind"], caption
        # "dots of one on another" may name the ground last
        assert sorted(colors) == sorted(attributes["background"]["colors"]), caption


def test_phrasing_varies_and_is_reproducible(scenes: torch.Tensor) -> None:
    attributes = attributes_of(scenes[0])
    phrasings = {describe(attributes, random.Random(seed)) for seed in range(40)}
    assert len(phrasings) > 10
    assert captions_of(scenes, seed=2) == captions_of(scenes, seed=2)
    assert captions_of(scenes, seed=2) != captions_of(scenes, seed=3)


@pytest.mark.parametrize("count", [1, 200])
def test_prompt_rows_are_distinct_and_complete(count: int) -> None:
    rows: list[dict[str, Any]] = prompt_rows(count, heldout=True, seed=9)
    assert len({row["prompt"] for row in rows}) == count
    assert [row["seed"] for row in rows] == list(range(count))
    assert all(parse(row["prompt"])[0] == row["attributes"]["objects"] for row in rows)
