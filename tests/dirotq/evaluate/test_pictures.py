import base64
import io

import numpy as np
import pytest
from PIL import Image

from dirotq.evaluate.pictures import QUALITIES, embed


def opened(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))


@pytest.fixture
def noise() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_what_fits_is_kept_without_loss(noise):
    found = embed([noise, noise], 100_000)
    assert found.stored == "PNG, lossless"
    assert [np.array_equal(opened(url), noise) for url in found.urls] == [True, True]


def test_the_best_quality_that_fits(noise):
    """Of a budget, and of one byte less than the best quality's."""
    whole = embed([noise], 20_000)
    assert whole.stored == f"WebP, quality {QUALITIES[0]}"
    assert opened(whole.urls[0]).size == noise.size
    taken = len(whole.urls[0])
    assert embed([noise], taken).stored == whole.stored
    less = embed([noise], taken - 1)
    assert less.stored == f"WebP, quality {QUALITIES[1]}"
    assert len(less.urls[0]) < taken


def test_pictures_shrink_only_where_no_quality_fits(noise):
    least = next(n for n in range(4000, 200, -50) if "size" in embed([noise], n).stored)
    small = embed([noise], least)
    assert small.stored.endswith(", 1/2 of the size")
    assert opened(small.urls[0]).size == (32, 48)
    assert len(small.urls[0]) <= least


def test_a_budget_that_nothing_fits_ends(noise):
    assert opened(embed([noise], 1).urls[0]).width >= 8


def test_pictures_of_a_pair_share_their_quality(noise):
    plain = Image.new("RGB", noise.size)
    found = embed([noise, plain], 12_000)
    assert found.stored.startswith("WebP")
    assert sum(map(len, found.urls)) <= 12_000
