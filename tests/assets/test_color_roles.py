"""Roles of color words: read off the scene, found in the caption, scored on color words only."""

import pytest
import torch

from dirotq.assets.captions import captions_of
from dirotq.assets.color_roles import NO_ROLE, color_roles, role_loss
from dirotq.assets.scenes import (
    BACKGROUNDS,
    COLOR,
    COLOR_1,
    COLOR_2,
    COLORS,
    COUNT,
    KIND,
    sample_scenes,
    slots,
)
from dirotq.assets.tiny_flux import train_tokenizers
from dirotq.assets.training_pool import tokenize


def test_every_color_word_has_its_role() -> None:
    scenes = sample_scenes(300, torch.Generator().manual_seed(3))
    captions = captions_of(scenes, seed=3)
    tokenizers = train_tokenizers(captions)
    t5_ids = tokenize(captions, tokenizers)[1]
    roles = color_roles(scenes.numpy(), t5_ids, tokenizers[1])
    for scene, ids, labels in zip(scenes, t5_ids, roles, strict=True):
        words = tokenizers[1].convert_ids_to_tokens(ids.tolist())
        named: dict[int, list[str]] = {0: [], 1: [], 2: []}
        for word, label in zip(words, labels.tolist(), strict=True):
            color = word.removeprefix("\u2581")
            assert (label == NO_ROLE) == (color not in COLORS)
            if label != NO_ROLE:
                named[label].append(color)
        objects = slots(scene[None])[0, : scene[COUNT], COLOR].tolist()
        plain = scene[KIND] == BACKGROUNDS.index("plain")
        assert named[0] == [COLORS[color] for color in objects]
        assert named[1] == [COLORS[scene[COLOR_1]]]
        assert named[2] == ([] if plain else [COLORS[scene[COLOR_2]]])


def test_only_color_words_count() -> None:
    roles = torch.tensor([[NO_ROLE, 0, 2, NO_ROLE], [1, NO_ROLE, NO_ROLE, 0]], dtype=torch.int8)
    logits = torch.zeros(2, 4, 3)
    logits[0, 1, 0] = logits[0, 2, 2] = logits[1, 0, 1] = 50.0  # three of the four are right
    logits[1, 3, 2] = 50.0
    logits[0, 0, 1] = 7.0  # not a color word
    loss, accuracy = role_loss(logits, roles)
    assert accuracy.item() == 0.75
    assert loss.item() == pytest.approx(50 / 4)


def test_a_batch_without_color_words_has_no_loss() -> None:
    roles = torch.full((2, 4), NO_ROLE, dtype=torch.int8)  # every caption dropped
    loss, accuracy = role_loss(torch.randn(2, 4, 3), roles)
    assert loss.item() == accuracy.item() == 0.0
