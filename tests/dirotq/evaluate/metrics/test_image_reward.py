"""The package is not installed here: a stand-in with its interface is."""

import sys

import pytest
import torch

from dirotq.errors import ConfigError
from dirotq.evaluate.metrics.image_reward import ImageReward

PACKAGE = """
class Model:
    def score(self, prompt, image):
        assert image.mode == "RGB"
        return image.getpixel((0, 0))[0] + len(prompt)

def load(name, device, med_config):
    assert name.endswith("ImageReward.pt") and med_config.endswith("med_config.json")
    assert device == "cpu"
    return Model()
"""


@pytest.fixture
def metric(tmp_path, monkeypatch):
    for name in ("ImageReward.pt", "med_config.json"):
        (tmp_path / name).write_text(name)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "ImageReward.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    yield ImageReward(
        path=str(tmp_path / "ImageReward.pt"), config=str(tmp_path / "med_config.json")
    )
    sys.modules.pop("ImageReward", None)


def test_one_score_per_image(metric):
    metric.check()
    meter = metric.open(torch.device("cpu"))
    images = torch.zeros(2, 3, 4, 4)
    images[1] = 1
    meter.update(images, ["four", "sixsix"], images)
    assert meter.compute() == [4, 261]
    assert meter.compute() == []


def test_what_is_missing(metric, tmp_path):
    (tmp_path / "med_config.json").unlink()
    with pytest.raises(ConfigError, match=r"med_config\.json does not exist"):
        metric.check()
    with pytest.raises(ConfigError, match=r"med_config\.json does not exist"):
        metric.identity()
