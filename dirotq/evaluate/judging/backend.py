"""What a judge is to the protocol: a function from two images to a text."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from dirotq.evaluate.judging.questions import Correction, Pair
from dirotq.evaluate.judging.rubric import Rubric


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back.

    ``text``     the raw answer
    ``refused``  the judge, or a filter before it, declined outside of the answer's form
    ``retries``  how often the question had to be sent again before it got through
    """

    text: str
    refused: bool = False
    retries: int = 0


class Unanswered(Exception):
    """No answer came although the question was sent again and again; ``retries`` times."""

    def __init__(self, reason: str, retries: int) -> None:
        super().__init__(reason)
        self.retries = retries


Compare = Callable[[Pair, Sequence[Correction]], Reply]
"""One question. Called from ``concurrency`` threads at a time. Raises Unanswered, or a DirotqError
if asking on makes no sense."""


class Backend(Protocol):
    """Configuration of a judge: a frozen dataclass whose tracked fields decide its answers.

    ``name``         the judge's name, kept beside every answer
    ``concurrency``  questions that may be under way at a time
    """

    @property
    def name(self) -> str: ...

    @property
    def concurrency(self) -> int: ...

    def check(self) -> None:
        """Raise ConfigError, before anything runs, for what can be known to fail."""
        ...

    def open(self, rubric: Rubric, stop: threading.Event) -> AbstractContextManager[Compare]:
        """Make it ready. Once ``stop`` is set, nothing is sent again."""
        ...
