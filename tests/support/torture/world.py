"""The tiny pipeline's line, an undisturbed store of it, and runs of it in forked processes.

Everything heavy is imported once, in the parent; each run is a fork, which may be killed, limited
or made another user without harm to its neighbours. The parent itself computes nothing.
"""

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dirotq.errors import DirotqError

if TYPE_CHECKING:
    from dirotq.pipeline.build import Pipeline

STAGES = ("capture", "basis", "rank", "gptq", "fuse", "pack", "reference", "validate")
SHORT = ("capture.calls=4", "prompts.calibration.count=4")
"""Two shards and two calls of each: what is hurt is how results are kept, not what they are."""
TIMED = ("report.json", "report.html", "_seconds/")
"""Files of `validate` and `reference` that hold the seconds of a run."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a forked run ended: ``done``, ``refused`` (an error of ours), ``foreign``, ``killed``.

    ``said``  the error's text, or what the run returned
    """

    how: str
    said: Any = None


@dataclass(slots=True)
class Counts:
    """What became of the attempts of one kind."""

    kind: str
    tried: int = 0
    survived: int = 0
    notes: list[str] = field(default_factory=list)
    """The attempts that did not: what was done, and what happened."""

    def count(self, problem: str | None) -> None:
        """One more attempt; ``problem`` says what went wrong, None that nothing did."""
        self.tried += 1
        if problem is None:
            self.survived += 1
        else:
            self.notes.append(problem)


@dataclass(frozen=True, slots=True)
class World:
    """``root`` holds the 16-bit model, the prompts and ``store``, the undisturbed one.

    until  the last stage that is hurt, or made anew, where nothing else is said
    """

    root: Path
    until: str = STAGES[-1]

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are hurt."""
        return STAGES[: STAGES.index(self.until) + 1]

    @property
    def store(self) -> Path:
        return self.root / "store"

    @classmethod
    def build(cls, root: Path, until: str = STAGES[-1]) -> "World":
        """Make the model and run the line once."""
        from tiny_line import model_folder, prompt_file

        model_folder(root), prompt_file(root)  # remembered by every fork
        root.chmod(0o755)
        for path in (root / "model").rglob("*"):  # other users read it too
            path.chmod(0o755 if path.is_dir() else 0o644)
        world = cls(root, until)

        world.line(world.store)  # its files are parsed once, for all forks

        def job() -> list[str]:
            from tiny_line import run

            run(world.line(world.store))
            return list(sys.modules)

        ended = forked(job)
        if ended.how != "done":
            raise RuntimeError(f"the undisturbed run failed: {ended}")
        # What a run imports is imported before all others fork: another user may not read it.
        for name in ended.said:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        return world

    def compress(
        self,
        store: Path,
        *more: str,
        before: Callable[[], None] | None = None,
        seconds: float | None = None,
        beside: Callable[[int], None] | None = None,
    ) -> Ended:
        """Run the line in a forked process, where ``before`` is called first.

        seconds  after which it is killed
        beside   is called with its id, in a process of its own
        """

        def job() -> dict[str, str]:
            from tiny_line import run

            if before is not None:
                before()
            return {name: str(a) for name, a in run(self.line(store, *more)).items()}

        return forked(job, seconds=seconds, beside=beside)

    def line(self, store: Path, *more: str) -> "Pipeline":
        """The line as the config tree makes it, up to ``until`` unless that is told."""
        from tiny_line import configured

        told = any(word.startswith("until=") for word in more)
        until = () if told else (f"until={self.until}",)
        return configured(self.root, store, *SHORT, *more, *until)

    def copy(self, place: Path, without: str | None = None) -> Path:
        """A copy of the undisturbed store; ``without`` a stage and all that follow it."""
        gone = STAGES[STAGES.index(without) :] if without else ()
        return Path(
            shutil.copytree(
                self.store,
                place,
                ignore=lambda folder, names: [
                    n for n in names if n in gone and folder == str(self.store)
                ],
            )
        )

    def differences(self, store: Path, *, until: str | None = None) -> str | None:
        """What in a store is not as in the undisturbed one; None if nothing.

        until  the stages up to this one have to be there ("": none; None: all that are hurt);
               whatever is there must have the same bytes
        """
        until = self.until if until is None else until
        wanted = STAGES[: STAGES.index(until) + 1] if until else ()
        for stage in STAGES:
            here, there = _keys(store / stage), _keys(self.store / stage)
            if extra := here - there:
                return f"{stage}: {min(extra)} was published beside what was asked for"
            if stage in wanted and there - here:
                return f"{stage}: nothing was published"
            for key in here:
                if problem := _differs(store / stage / key, self.store / stage / key):
                    return f"{stage}/{key}: {problem}"
        return None

    def folder(self, name: str) -> Path:
        """A fresh folder for one attempt, on the same disk."""
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.root))


def forked(
    job: Callable[[], Any],
    *,
    seconds: float | None = None,
    beside: Callable[[int], None] | None = None,
) -> Ended:
    """Call ``job`` in a forked process and wait for it; SIGKILL after ``seconds``.

    beside  is called with the process's id, in a third one that nobody waits for
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _report(job, writing)
    os.close(writing)
    if seconds is not None:
        _apart(partial(_kill_after, child, seconds))
    if beside is not None:
        _apart(partial(beside, child))
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if not text:
        return Ended("killed", code)
    return Ended(*json.loads(text))


def _report(job: Callable[[], Any], writing: int) -> None:
    """Run a job in the child, send what became of it, and leave without any clean-up."""
    try:
        # Logs and progress lines of hundreds of runs tell nothing.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        ended = ["done", job()]
    except DirotqError as error:
        ended = ["refused", str(error)]
    except BaseException as error:  # noqa: BLE001 - the report is what this is for
        ended = ["foreign", f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"]
    os.write(writing, json.dumps(ended).encode())
    os._exit(0)


def _kill_after(child: int, seconds: float) -> None:
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


def _apart(job: Callable[[], None]) -> None:
    """Call it in a fork: a thread in the parent would be copied half-way into the next child."""
    if os.fork() == 0:
        if os.fork() == 0:  # its parent leaves at once, so that nobody has to wait for it
            with contextlib.suppress(BaseException):
                job()
        os._exit(0)
    else:
        os.wait()


def _keys(stage: Path) -> set[str]:
    """Published artifacts of a stage: what a reader would take."""
    return {
        path.parent.name for path in stage.glob("*/manifest.json") if "." not in path.parent.name
    }


def _differs(here: Path, there: Path) -> str | None:
    mine, theirs = (_files(path / "data") for path in (here, there))
    if names := mine.keys() ^ theirs.keys():
        return f"{min(names)} is in one of both"
    for name in mine:
        if (
            not any(part in f"{name}/" for part in TIMED)
            and mine[name].read_bytes() != theirs[name].read_bytes()
        ):
            return f"{name} has other bytes"
    return None


def _files(folder: Path) -> dict[str, Path]:
    return {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
