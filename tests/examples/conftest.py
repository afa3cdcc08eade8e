"""The tiny pipeline (tests/support/tiny_line.py), built once."""

from tiny_fixtures import *  # noqa: F403
