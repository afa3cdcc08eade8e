"""Command lines at random on the toy line; `tests/support/fuzz_cli.py` says what is held."""

from fuzz_cli import COMMAND_LINES, check_command_line
from hypothesis import HealthCheck, given, settings


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(COMMAND_LINES)
def test_any_command_line_ends_in_words(words):
    check_command_line(words)
