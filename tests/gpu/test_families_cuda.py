"""All stages on CUDA, on a tiny pipeline of every model family."""

import math

import pytest
from family_line import family_line
from tiny_families import TINY
from tiny_line import run
from tiny_pipelines import PIPELINES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32")]


@pytest.mark.parametrize("name", [name for name in TINY if name in PIPELINES])
def test_every_family_runs_through(tiny_root, name):
    artifacts = run(family_line(tiny_root, name, "device=cuda"))
    for artifact in artifacts.values():
        assert all(math.isfinite(value) for value in artifact.metrics.values())
    assert artifacts["fuse"].metrics["network_error"] < 1e-5
    assert artifacts["validate"].metrics["psnr"] > 20
