"""The reader's targets, its score, and its files."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dirotq.errors import ArtifactError
from dirotq.evaluate.attribute_reader import ABSENT, AttributeReader, ReaderConfig, caption_accuracy

CONFIG = ReaderConfig(
    shapes=("circle", "star"),
    colors=("red", "blue"),
    sizes=("small", "large"),
    positions=tuple("abcdefghi"),
    backgrounds=("plain", "dotted"),
    channels=(8, 8, 8, 8),
)
SCENES = [
    {
        "objects": [
            {"shape": "star", "color": "blue", "size": "small", "position": "c"},
            {"shape": "circle", "color": "red", "size": "large", "position": "h"},
        ],
        "background": {"kind": "dotted", "colors": ["blue", "red"]},
    },
    {
        "objects": [{"shape": "circle", "color": "blue", "size": "large", "position": "a"}],
        "background": {"kind": "plain", "colors": ["red"]},
    },
]
IMAGES = torch.zeros(2, 3, 128, 128)


class Answers(nn.Module):
    """Stands in for a trained reader: answers with given classes, whatever the image."""

    def __init__(self, answers: dict[str, Tensor]) -> None:
        super().__init__()
        self.answers, self.shown = answers, 0
        self.reader = AttributeReader(CONFIG)
        self.targets = self.reader.targets

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        part = slice(self.shown, self.shown + len(images))
        self.shown += len(images)
        hot = {n: nn.functional.one_hot(a[part].clamp_min(0), 5) for n, a in self.answers.items()}
        return {n: h.movedim(-1, 1).float() for n, h in hot.items()}


def perfect() -> dict[str, Tensor]:
    return AttributeReader(CONFIG).targets(SCENES)


def test_targets_name_every_cell_and_the_background() -> None:
    targets = perfect()
    assert targets["shape"].tolist() == [[0, 0, 2, 0, 0, 0, 0, 1, 0], [1, *[0] * 8]]
    assert targets["color"][0].tolist() == [ABSENT, ABSENT, 1, *[ABSENT] * 4, 0, ABSENT]
    assert targets["size"][1].tolist() == [1, *[ABSENT] * 8]
    assert targets["kind"].tolist() == [1, 0]
    assert targets["color_1"].tolist() == [1, 0]
    assert targets["color_2"].tolist() == [1, 0]


def test_a_perfect_reading_scores_one() -> None:
    accuracy = caption_accuracy(Answers(perfect()), IMAGES, SCENES, batch=1)
    assert accuracy == dict.fromkeys(
        ("shape", "color", "size", "position", "background", "mean"), 1.0
    )


def test_each_mistake_costs_its_own_attribute() -> None:
    wrong = perfect()
    wrong["color"][0, 2] = 0  # one of three objects
    wrong["color_2"][1] = 1  # one of two backgrounds
    wrong["shape"][1, 5] = 1  # an object too many: position of one of two images
    accuracy = caption_accuracy(Answers(wrong), IMAGES, SCENES)
    assert accuracy["color"] == pytest.approx(2 / 3)
    assert accuracy["background"] == 0.5
    assert accuracy["position"] == 0.5
    assert accuracy["shape"] == accuracy["size"] == 1
    assert accuracy["mean"] == pytest.approx((2 / 3 + 0.5 + 0.5 + 2) / 5)


def test_a_missing_object_is_wrong_in_everything_it_promised() -> None:
    wrong = perfect()
    wrong["shape"][1, 0] = 0
    accuracy = caption_accuracy(Answers(wrong), IMAGES, SCENES)
    for name in ("shape", "color", "size"):
        assert accuracy[name] == pytest.approx(2 / 3)
    assert accuracy["position"] == 0.5


def test_save_and_load_give_the_same_reader(tmp_path: Path) -> None:
    reader = AttributeReader(CONFIG).half().float()
    reader.save(tmp_path)
    images = torch.rand(3, 3, 128, 128)
    loaded = AttributeReader.load(tmp_path)
    assert loaded.config == CONFIG
    assert torch.equal(loaded.features(images), reader.features(images))
    assert loaded.features(images).shape == (3, CONFIG.channels[-1])
    again = tmp_path / "again"
    loaded.save(again)
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_bad_folders_and_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json"):
        AttributeReader.load(tmp_path)
    AttributeReader(CONFIG).save(tmp_path)
    (tmp_path / "config.json").write_text('{"shapes": ["circle"]}')
    with pytest.raises(ArtifactError, match="attribute reader"):
        AttributeReader.load(tmp_path)
    with pytest.raises(ArtifactError, match="64, 64"):
        AttributeReader(CONFIG).features(torch.rand(1, 3, 64, 64))
    with pytest.raises(ArtifactError, match="2 images for 1 captions"):
        caption_accuracy(AttributeReader(CONFIG), IMAGES, SCENES[:1])
