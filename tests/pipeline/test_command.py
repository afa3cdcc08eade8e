import shlex
from dataclasses import dataclass
from typing import ClassVar

import pytest

from dirotq.pipeline import dag
from dirotq.pipeline.command import command, running
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.secrecy import HIDDEN
from dirotq.pipeline.store import ArtifactStore


def test_outside_of_a_run_there_is_none():
    assert command() is None
    with running(["rank.r=8"]):
        assert command() == "dirotq compress rank.r=8"
    assert command() is None


def test_it_ends_with_an_error_too():
    with pytest.raises(ValueError, match="broken"), running([]):
        assert command() == "dirotq compress"
        raise ValueError("broken")
    assert command() is None


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("store='/a b'", "store=/a b"),  # as quoted for Hydra, which is done again
        ("store=/plain", "store=/plain"),
        ("method.name='quoted'", "method.name='quoted'"),  # quotes that somebody typed
        ("x.api_key=abc", f"x.api_key={HIDDEN}"),
    ],
)
def test_a_shell_reads_what_was_meant(override, word):
    with running([override, "force=[rank]", "++force=rank"]):
        assert shlex.split(command()) == ["dirotq", "compress", word]


@dataclass(frozen=True)
class Tell:
    version: ClassVar[str] = "1"

    def run(self, out):
        (out / "command.txt").write_text(command())
        return {}


def test_stages_know_the_command_that_they_run_under(tmp_path):
    steps, store = dag.plan({"tell": Tell()}, {"tell": {}}), ArtifactStore(tmp_path / "store")
    made = dag.run(steps, store, LocalExecutor(), overrides=["rank.r=8"])
    told = made["tell"].artifact.file("command.txt").read_text()
    assert told == "dirotq compress rank.r=8"
