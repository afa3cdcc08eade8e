"""The tiny pipeline, built once, and the command line on the toy line (tests/support)."""

from tiny_fixtures import *  # noqa: F403
from toy_fixtures import *  # noqa: F403
