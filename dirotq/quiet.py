"""What diffusers and transformers print while they load something: collected, and gone through."""

import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dirotq.errors import ArtifactError

log = logging.getLogger(__name__)

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
MADE_UP = re.compile("newly initialized|MISSING|MISMATCH|seem corrupted")
"""What diffusers and transformers say when a model has parameters that no file gave it."""


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep diffusers' and transformers' bars and notices off the screen; their warnings, collected.

    What they warn of while a model is loaded is for :func:`heed`.
    """
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [
        (library.get_verbosity(), library.is_progress_bar_enabled(), logger.handlers)
        for library, logger in zip(libraries, loggers, strict=True)
    ]
    said = _Collected()
    for library, logger, (level, bars, _) in zip(libraries, loggers, before, strict=True):
        _level(library, logging.WARNING, level)
        if bars:
            library.disable_progress_bar()
        logger.handlers = [said]
    try:
        yield said.messages
    finally:
        for library, logger, (level, bars, handlers) in zip(
            libraries, loggers, before, strict=True
        ):
            _level(library, level, logging.WARNING)
            logger.handlers = handlers
            if bars:
                library.enable_progress_bar()


def _level(library: Any, wanted: int, present: int) -> None:
    """Set a library's level where it is another: loggers of all libraries forget their own then."""
    if wanted != present:
        library.set_verbosity(wanted)


class _Collected(logging.Handler):
    """A handler that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def heed(said: Iterable[str]) -> None:
    """Go through the warnings of a load: ArtifactError if weights were made up, others are shown.

    Files were held against their classes before (dirotq/sources/completeness.py): this is the
    loaders' own word on it.
    """
    for message in said:
        plain = " ".join(ESCAPES.sub("", message).split())
        if MADE_UP.search(plain):
            raise ArtifactError(
                f"weights are missing, and the loader made some up: {plain[:600]}. Download the "
                "model again"
            )
        log.warning("%s", plain)
