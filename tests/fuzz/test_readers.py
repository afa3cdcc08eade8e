"""Readers under random and damaged input, for a moment; `make fuzz` takes longer."""

from typing import Any

import pytest
from fuzz.attempt import attempt, sandbox
from fuzz.readers import READERS
from hypothesis import HealthCheck, Phase, given, settings

from dirotq.errors import ConfigError

EXAMPLES = 25
SLOW = {"store": 8}
ELSEWHERE = ("command_line", "packed_folder")
"""Readers that tests/dirotq/test_fuzz_cli.py and tests/dirotq/packed/test_folder.py try."""


@pytest.mark.parametrize("name", [name for name in READERS if name not in ELSEWHERE])
def test_a_reader_raises_errors_of_ours_and_nothing_else(name, capfd):
    strategy, read = READERS[name]
    with sandbox() as root:

        @settings(
            max_examples=SLOW.get(name, EXAMPLES), database=None, deadline=None, derandomize=True,
            phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategy)
        def run(example: Any) -> None:
            assert attempt(read, example, root) is None

        run()


@pytest.mark.parametrize(
    ("read", "kind", "what"),
    [
        (lambda folder, _: (folder / "x").write_text("x"), None, ""),
        (lambda folder, _: {}["x"], "foreign", "KeyError test_readers.py"),
        (lambda folder, _: __import__("sys").exit(1), "foreign", "SystemExit"),
        (
            lambda folder, _: (folder / "../../home/x").resolve().write_text("x"),
            "outside",
            "home/x",
        ),
        (
            lambda folder, _: (folder / "../../../no-such-file").unlink(missing_ok=True),
            "outside",
            "no-such-file",
        ),
        (lambda folder, _: __import__("time").sleep(30), "hang", "test_readers.py"),
    ],
)
def test_what_counts_as_a_finding(read, kind, what, monkeypatch):
    monkeypatch.setattr("fuzz.attempt.HANG", 0.2)
    with sandbox() as root:
        found = attempt(read, 5, root)
    assert (found and found.kind) == kind
    assert found is None or (what in found.what and found.example == "5")


def test_an_error_of_ours_is_no_finding():
    def read(folder, example):
        raise ConfigError("refused")

    with sandbox() as root:
        assert attempt(read, 5, root) is None
