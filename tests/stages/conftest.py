"""The tiny pipeline (tests/support/tiny_line.py), built once."""

import pytest
from tiny_fixtures import *  # noqa: F403


@pytest.fixture(scope="module")
def looks_every_time():
    """For tests that stop a stage half-way: units take milliseconds here, so each one's entry is
    written at once. It takes a quarter of a line's time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dirotq.pipeline.units.LOOK", 0.0)
        yield
