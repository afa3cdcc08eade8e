"""The command that a stage runs under, so that what it writes can say how it is made again."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from dirotq.pipeline.quoting import quoted, setting
from dirotq.pipeline.secrecy import without_secrets

SILENT = ("force", "store_remote", "store_push")
_OVERRIDES: ContextVar[tuple[str, ...] | None] = ContextVar("overrides", default=None)


@contextmanager
def running(overrides: Sequence[str]) -> Iterator[None]:
    """Tell what runs inside of the block which overrides it runs with."""
    token = _OVERRIDES.set(tuple(overrides))
    try:
        yield
    finally:
        _OVERRIDES.reset(token)


def command() -> str | None:
    """Return the shell command that makes this run's artifacts; None outside of a run.

    Of one job of a sweep, its own values. No key and no password is in it, and nothing of
    ``SILENT``, which decides nothing about what comes out.
    """
    overrides = _OVERRIDES.get()
    if overrides is None:
        return None
    telling = [word for word in without_secrets(overrides) if setting(word)[1] not in SILENT]
    return shlex.join(["dirotq", "compress", *map(_as_typed, telling)])


def _as_typed(word: str) -> str:
    """Return an override without the quotes that Hydra wants, where they are put again anyway."""
    head, _, value = word.partition("=")
    bare = f"{head}={value[1:-1]}"
    return bare if value.startswith("'") and quoted(bare) == word else word
