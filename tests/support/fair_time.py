"""Seconds that a busy machine does not spoil."""

import time
from pathlib import Path


def fair_seconds() -> float:
    """A clock like ``time.monotonic`` that stands while this thread waits for a processor (Linux).

    It goes on while the thread computes, and while it waits for anything else.
    """
    now = time.monotonic()
    try:
        delayed = int(Path("/proc/thread-self/schedstat").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        delayed = 0
    return now - delayed / 1e9
