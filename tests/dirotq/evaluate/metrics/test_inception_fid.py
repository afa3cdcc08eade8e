"""With a small TorchScript network in place of Inception: the interface and the steps are real."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from dirotq.errors import ConfigError
from dirotq.evaluate.distributions import frechet_distance
from dirotq.evaluate.metrics.inception_fid import InceptionFid, clean_resize
from dirotq.evaluate.png import eight_bits

CPU = torch.device("cpu")


class Layers(nn.Module):
    """Means of quarters: 12 features. Refuses what was not resized and normalized."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == 3 and x.shape[2] == 299 and x.shape[3] == 299
        assert x.min() >= -1 and x.max() <= 1
        return nn.functional.adaptive_avg_pool2d(x, 2)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) * 0  # resizes by itself; clean-fid does not call it


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "inception.pt"
    torch.jit.script(Network()).save(str(file))
    return str(file)


def noise(count, seed=0):
    return torch.rand(count, 3, 24, 32, generator=torch.Generator().manual_seed(seed))


def features(images):
    resized = torch.stack([clean_resize(eight_bits(x)) for x in images])
    return nn.functional.adaptive_avg_pool2d((resized - 128) / 128, 2).flatten(1)


def test_distance_to_the_16_bit_images(path):
    metric = InceptionFid(path=path, ground_truth=None, batch=4)
    metric.check()
    assert metric.paired
    meter = metric.open(CPU)
    a, b = noise(7), noise(7, 1) * 0.8
    for span in (slice(0, 3), slice(3, 7)):
        meter.update(a[span], ["x"] * len(a[span]), b[span])
    assert meter.compute() == pytest.approx(frechet_distance(features(a), features(b)), rel=1e-5)
    meter.update(b, ["x"] * 7, b)  # the next set starts from nothing
    assert meter.compute() == pytest.approx(0, abs=1e-6)


def test_distance_to_a_folder(path, tmp_path):
    (tmp_path / "deeper").mkdir()
    real = noise(5, 2)
    for i, image in enumerate(real):
        place = tmp_path / "deeper" if i % 2 else tmp_path
        Image.fromarray(eight_bits(image)).save(place / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    metric = InceptionFid(path=path, ground_truth=str(tmp_path), batch=3)
    metric.check()
    assert not metric.paired
    meter = metric.open(CPU)
    images = noise(4)
    for _ in range(2):
        meter.update(images, ["x"] * 4, images * 0)
        want = frechet_distance(features(images), features(real))
        assert meter.compute() == pytest.approx(want, rel=1e-5)


def test_identity_is_content(path, tmp_path):
    for i in range(2):
        Image.fromarray(eight_bits(noise(1, i)[0])).save(tmp_path / f"{i}.png")
    metric = InceptionFid(path=path, ground_truth=str(tmp_path), batch=3)
    before = metric.identity()
    assert before == InceptionFid(path=path, ground_truth=str(tmp_path), batch=9).identity()
    (tmp_path / "0.png").rename(tmp_path / "renamed.png")
    assert metric.identity() == before
    Image.fromarray(eight_bits(noise(1, 9)[0])).save(tmp_path / "1.png")
    assert metric.identity() != before
    assert InceptionFid(path=path, ground_truth=None, batch=3).identity() != before


def test_images_in_linked_folders_count(path, tmp_path):
    """Three of six were found: rglob does not enter linked folders."""
    root, outside = tmp_path / "truth", tmp_path / "outside"
    for i in range(6):
        place = (root, outside / "deep")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(eight_bits(noise(1, i)[0])).save(place / f"{i}.png")
    (root / "more").symlink_to(outside)
    metric = InceptionFid(path=path, ground_truth=str(root), batch=3)
    assert len(metric._truth()) == 6
    before = metric.identity()
    Image.fromarray(eight_bits(noise(1, 9)[0])).save(outside / "deep" / "1.png")
    assert metric.identity() != before
    (root / "loop").symlink_to(root)
    with pytest.raises(ConfigError, match="loop is a link back"):
        metric.check()


def test_a_folder_without_images(path, tmp_path):
    with pytest.raises(ConfigError, match=r"holds 0 images \(\.png"):
        InceptionFid(path=path, ground_truth=str(tmp_path), batch=3).check()
    with pytest.raises(ConfigError, match="batch=0: use at least 1"):
        InceptionFid(path=path, ground_truth=None, batch=0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 255), st.integers(8, 400), st.integers(8, 400))
def test_resizing_keeps_a_constant_image(value, height, width):
    resized = clean_resize(np.full((height, width, 3), value, np.uint8))
    assert resized.shape == (3, 299, 299) and resized.dtype == torch.float32
    torch.testing.assert_close(resized, torch.full_like(resized, value), atol=1e-3, rtol=0)


def test_resizing_antialiases_and_does_not_round():
    """A checkerboard of twice the size averages to grey; a ramp keeps its fractions."""
    board = np.indices((598, 598)).sum(0) % 2 * 255
    grey = clean_resize(np.repeat(board[..., None], 3, 2).astype(np.uint8))
    assert (grey[:, 5:-5, 5:-5] - 127.5).abs().max() < 2
    ramp = np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 100, 0).repeat(3, 2)
    assert (clean_resize(ramp) % 1).abs().max() > 0.3


def test_eight_bits_are_rounded_not_cut():
    image = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0]).expand(3, 1, 4)
    assert eight_bits(image)[0, :, 0].tolist() == [0, 0, 1, 255]
