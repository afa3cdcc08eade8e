"""The tiny pipeline (tests/support/tiny_line.py), built once; float32 that is float32."""

import pytest
import torch
from tiny_fixtures import *  # noqa: F403


@pytest.fixture
def full_float32():
    """No TF32: float32 means float32, as on the CPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
