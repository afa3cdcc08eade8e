"""The command line on the toy line (tests/support/toyline), in this process and in others."""

from toy_fixtures import *  # noqa: F403
