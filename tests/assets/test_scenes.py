"""The renderer draws what a scene says, where it says it, and the split holds."""

import pytest
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
    FIRST_SLOT,
    JITTER_X,
    JITTER_Y,
    KIND,
    PALETTE,
    POSITIONS,
    SHAPE,
    SHAPES,
    SIDE,
    SIZE,
    SIZES,
    held_out,
    render,
    sample_scenes,
    sample_side,
    slots,
)


def one_object(**fields: int) -> Tensor:
    """A scene with one object on a plain white background: int64 [1, 22]."""
    scene = torch.full((1, FIRST_SLOT + 18), -1)
    scene[0, :FIRST_SLOT] = torch.tensor([0, COLORS.index("white"), -1, 1])
    values = {"cell": 4, "shape": 0, "color": 0, "size": 1, "x": 0, "y": 0} | fields
    slots(scene)[0, 0] = torch.tensor(list(values.values()))
    return scene


def drawn(scene: Tensor) -> Tensor:
    """Where a scene differs from its empty background: bool [L, L]."""
    empty = scene.clone()
    slots(empty)[...] = -1
    return ((render(scene) - render(empty)).abs().amax(1) > 0.2)[0]


def test_images_are_in_range_and_deterministic() -> None:
    scenes = sample_scenes(16, torch.Generator().manual_seed(3))
    images = render(scenes)
    assert images.shape == (16, 3, SIDE, SIDE)
    assert images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert torch.equal(images, render(scenes))
    assert torch.equal(scenes, sample_scenes(16, torch.Generator().manual_seed(3)))


def test_scene_does_not_depend_on_its_batch() -> None:
    scenes = sample_scenes(8, torch.Generator().manual_seed(4))
    assert torch.equal(render(scenes)[3:4], render(scenes[3:4]))


@pytest.mark.parametrize("size", range(len(SIZES)), ids=SIZES)
def test_shapes_differ_from_each_other(size: int) -> None:
    masks = torch.stack([drawn(one_object(shape=s, size=size)) for s in range(len(SHAPES))])
    for i in range(len(SHAPES)):
        for j in range(i):
            differing = (masks[i] ^ masks[j]).sum() / (masks[i] | masks[j]).sum()
            assert differing > 0.1, f"{SHAPES[i]} looks like {SHAPES[j]}"


@pytest.mark.parametrize("shape", range(len(SHAPES)), ids=SHAPES)
def test_every_shape_stays_inside_its_cell(shape: int) -> None:
    column, row = torch.arange(SIDE) * 3 // SIDE, torch.arange(SIDE)[:, None] * 3 // SIDE
    for cell in range(len(POSITIONS)):
        for jitter in (-2, 2):
            mask = drawn(one_object(shape=shape, cell=cell, x=jitter, y=jitter))
            assert mask.any()
            assert not mask[row * 3 + column != cell].any(), POSITIONS[cell]


def test_large_is_larger_than_small() -> None:
    for shape in range(len(SHAPES)):
        small, large = (drawn(one_object(shape=shape, size=s)).sum() for s in (0, 1))
        assert large > 2 * small


def test_object_is_drawn_in_its_color() -> None:
    for index, color in enumerate(COLORS):
        image = render(one_object(shape=SHAPES.index("square"), color=index))
        center = image[0, :, SIDE // 2, SIDE // 2] * 0.5 + 0.5
        assert torch.allclose(center, torch.tensor(PALETTE[color]), atol=1e-5), color


def test_jitter_moves_the_object() -> None:
    moved = drawn(one_object(x=2, y=-1))
    assert torch.equal(moved, drawn(one_object()).roll((-1, 2), (0, 1)))


@pytest.mark.parametrize("kind", BACKGROUNDS[1:])
def test_background_shows_both_of_its_colors(kind: str) -> None:
    first, second = COLORS.index("blue"), COLORS.index("yellow")
    scene = one_object(cell=0)
    scene[0, :COUNT] = torch.tensor([BACKGROUNDS.index(kind), first, second])
    plain = scene.clone()
    images = {}
    for color in (first, second):
        plain[0, :COUNT] = torch.tensor([0, color, -1])
        images[color] = render(plain)
    image = render(scene)
    for color in (first, second):
        same = (image - images[color]).abs().amax(1) < 0.1
        assert same[..., 64:].float().mean() > 0.02, COLORS[color]


def test_sampled_scenes_are_well_formed() -> None:
    scenes = sample_scenes(4000, torch.Generator().manual_seed(5))
    objects = slots(scenes)
    present = objects[..., CELL] >= 0
    assert torch.equal(present.sum(1), scenes[:, COUNT])
    assert set(scenes[:, COUNT].tolist()) == {1, 2, 3}
    assert (objects[~present] == -1).all()
    for field, names in ((CELL, POSITIONS), (SHAPE, SHAPES), (COLOR, COLORS), (SIZE, SIZES)):
        assert set(objects[present][:, field].tolist()) == set(range(len(names)))
    assert objects[present][:, JITTER_X : JITTER_Y + 1].abs().max() == 2
    cells = torch.where(present, objects[..., CELL], -1 - torch.arange(3))
    assert all(len(set(row)) == 3 for row in cells.tolist()), "two objects share a cell"
    for background in (COLOR_1, COLOR_2):
        assert not ((objects[..., COLOR] == scenes[:, background, None]) & present).any()
    assert torch.equal(scenes[:, COLOR_2] == -1, scenes[:, KIND] == BACKGROUNDS.index("plain"))


def test_split_holds_out_a_sixteenth_and_ignores_order_and_jitter() -> None:
    scenes = sample_scenes(40_000, torch.Generator().manual_seed(6))
    side = held_out(scenes)
    assert abs(side.double().mean().item() - 1 / 16) < 0.005
    other = scenes.clone()
    slots(other).copy_(slots(scenes).flip(1))
    present = slots(other)[..., CELL] >= 0
    slots(other)[..., JITTER_X] = torch.where(present, 1, -1)
    assert torch.equal(side, held_out(other))


@pytest.mark.parametrize("heldout", [False, True])
def test_sample_side_stays_on_its_side(heldout: bool) -> None:
    scenes = sample_side(500, heldout=heldout, generator=torch.Generator().manual_seed(7))
    assert len(scenes) == 500
    assert (held_out(scenes) == heldout).all()
