"""How fast a server may be asked."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


class Pacer:
    """Spaces requests of all threads evenly: at most ``per_minute`` of them start in a minute.

    ``per_minute``  None: no limit of ours
    ``sleep``       waits up to so many seconds; returns True to give up waiting
    """

    def __init__(
        self,
        per_minute: float | None,
        *,
        sleep: Callable[[float], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.interval = 60 / per_minute if per_minute else 0.0
        self.sleep, self.clock = sleep, clock
        self._lock = threading.Lock()
        self._next = clock()

    def wait(self) -> None:
        """Return when the next request may start."""
        while True:
            with self._lock:
                now = self.clock()
                if now >= self._next:
                    self._next = now + self.interval
                    return
                left = self._next - now
            # Asked again after sleeping: another thread may have been told to hold meanwhile.
            if self.sleep(left):
                return

    def hold(self, seconds: float) -> None:
        """Start nothing for so long, in no thread: a server said so."""
        with self._lock:
            self._next = max(self._next, self.clock() + seconds)


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (a number or an HTTP date), None without one."""
    if header is None:
        return None
    if header.strip().replace(".", "", 1).isdigit():
        return float(header)
    try:
        at = parsedate_to_datetime(header)
    except ValueError:
        return None
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max((at - datetime.now(UTC)).total_seconds(), 0.0)
