"""The committed prompt files are what the script writes, and the held-out side is held out."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirotq.assets.make_prompts import PROMPTS, prompt_sets
from dirotq.assets.scenes import (
    BACKGROUNDS,
    COLORS,
    FIRST_SLOT,
    POSITIONS,
    SHAPES,
    SIZES,
    held_out,
    slots,
)


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PROMPTS / name).read_text().splitlines()]


def scene_of(attributes: dict[str, Any]) -> Tensor:
    """The scene row that attributes describe (jitter 0): int64 [1, 22]."""
    scene = torch.full((1, FIRST_SLOT + 18), -1)
    background, objects = attributes["background"], attributes["objects"]
    colors = [COLORS.index(color) for color in background["colors"]]
    first, second = (*colors, -1)[:2]
    kind = BACKGROUNDS.index(background["kind"])
    scene[0, :FIRST_SLOT] = torch.tensor([kind, first, second, len(objects)])
    for slot, thing in zip(slots(scene)[0], objects, strict=False):
        cell, shape = POSITIONS.index(thing["position"]), SHAPES.index(thing["shape"])
        color, size = COLORS.index(thing["color"]), SIZES.index(thing["size"])
        slot.copy_(torch.tensor([cell, shape, color, size, 0, 0]))
    return scene


def canonical(row: dict[str, Any]) -> str:
    """The scene behind a row, whatever the phrasing and the order of its objects."""
    objects = sorted(row["attributes"]["objects"], key=lambda thing: thing["position"])
    return json.dumps([objects, row["attributes"]["background"]], sort_keys=True)


def test_files_are_what_the_script_writes() -> None:
    for name, text in prompt_sets().items():
        assert (PROMPTS / name).read_text() == text, f"{name}: run dirotq.assets.make_prompts"


def test_calibration_is_trained_side_and_heldout_is_not() -> None:
    for name, count, expected in (
        ("tiny_calibration.jsonl", 128, False),
        ("tiny_heldout.jsonl", 512, True),
    ):
        rows = rows_of(name)
        assert len(rows) == count
        scenes = torch.cat([scene_of(row["attributes"]) for row in rows])
        assert (held_out(scenes) == expected).all(), name


def test_calibration_and_heldout_share_no_scene_and_no_prompt() -> None:
    calibration, heldout = rows_of("tiny_calibration.jsonl"), rows_of("tiny_heldout.jsonl")
    assert not {canonical(row) for row in calibration} & {canonical(row) for row in heldout}
    assert not {row["prompt"] for row in calibration} & {row["prompt"] for row in heldout}


def test_general_prompts_are_128_distinct_ones() -> None:
    rows = rows_of("general.jsonl")
    assert len({row["prompt"].lower() for row in rows}) == len(rows) == 128
    assert all(set(row) == {"prompt", "seed"} and isinstance(row["seed"], int) for row in rows)
    lengths = [len(row["prompt"].split()) for row in rows]
    assert min(lengths) >= 4 and max(lengths) <= 60
    assert max(lengths) > 4 * min(lengths), "the set should vary in length"


def test_assets_stay_small() -> None:
    files = [f for f in PROMPTS.parent.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    total = sum(f.stat().st_size for f in files)
    assert total <= 40 * 10**6, f"assets/ holds {total / 10**6:.1f} MB, at most 40 are allowed"
    assert all(Path(f).stat().st_size <= 9 * 10**6 for f in files)
