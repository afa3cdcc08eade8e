"""The reader is trained on the right answers, and the one in assets/ reads well."""

from pathlib import Path

import pytest
import torch

import dirotq.assets
from dirotq.assets.captions import attributes_of
from dirotq.assets.scenes import render, sample_side
from dirotq.assets.train_reader import build_reader, reader_targets
from dirotq.evaluate.attribute_reader import AttributeReader, caption_accuracy

HOME = Path(dirotq.assets.__file__).parent / "attribute-reader"


def test_targets_from_tensors_and_from_captions_agree() -> None:
    scenes = sample_side(300, heldout=False, generator=torch.Generator().manual_seed(1))
    expected = build_reader().targets([attributes_of(scene) for scene in scenes])
    found = reader_targets(scenes)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.equal(found[name], values), name


def test_reader_is_small() -> None:
    assert sum(p.numel() for p in build_reader().parameters()) <= 400_000


@pytest.mark.skipif(not HOME.exists(), reason="assets/attribute-reader is not there")
def test_shipped_reader_reads_rendered_scenes() -> None:
    scenes = sample_side(256, heldout=True, generator=torch.Generator().manual_seed(2))
    attributes = [attributes_of(scene) for scene in scenes]
    accuracy = caption_accuracy(AttributeReader.load(HOME), render(scenes) * 0.5 + 0.5, attributes)
    assert min(accuracy.values()) >= 0.98, accuracy


@pytest.mark.skipif(not HOME.exists(), reason="assets/attribute-reader is not there")
def test_shipped_reader_notices_wrong_images() -> None:
    scenes = sample_side(64, heldout=True, generator=torch.Generator().manual_seed(3))
    attributes = [attributes_of(scene) for scene in scenes]
    images = render(scenes.roll(1, 0)) * 0.5 + 0.5
    assert caption_accuracy(AttributeReader.load(HOME), images, attributes)["mean"] < 0.4
