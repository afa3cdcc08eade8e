import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from dirotq.evaluate.judging.pacing import Pacer, retry_after


class Clock:
    """Time passes only by sleeping."""

    def __init__(self):
        self.now, self.lock = 100.0, threading.Lock()

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        with self.lock:
            self.now += seconds


def test_requests_are_spaced_evenly():
    clock = Clock()
    pacer = Pacer(30, sleep=clock.sleep, clock=clock)
    starts = []
    for _ in range(4):
        pacer.wait()
        starts.append(clock.now - 100)
    assert starts == pytest.approx([0, 2, 4, 6])


def test_idle_time_is_no_credit_for_a_burst():
    clock = Clock()
    pacer = Pacer(30, sleep=clock.sleep, clock=clock)
    clock.sleep(1000)
    pacer.wait()
    pacer.wait()
    assert clock.now == pytest.approx(1102)


def test_the_limit_holds_for_all_threads_together():
    clock = Clock()
    pacer = Pacer(60, sleep=clock.sleep, clock=clock)
    threads = [threading.Thread(target=lambda: [pacer.wait() for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clock.now - 100 >= 19 - 1e-6  # 20 requests, one a second


def test_without_a_limit_nobody_waits():
    clock = Clock()
    pacer = Pacer(None, sleep=clock.sleep, clock=clock)
    for _ in range(5):
        pacer.wait()
    assert clock.now == 100


def test_hold_stops_everybody():
    clock = Clock()
    pacer = Pacer(None, sleep=clock.sleep, clock=clock)
    pacer.hold(7)
    pacer.hold(3)  # a shorter one shortens nothing
    pacer.wait()
    assert clock.now == 107


def test_told_to_hold_while_asleep():
    clock = Clock()
    told = []

    def sleep(seconds):
        clock.sleep(seconds)
        if not told:
            told.append(True)
            pacer.hold(9)

    pacer = Pacer(60, sleep=sleep, clock=clock)
    pacer.wait()
    pacer.wait()
    assert clock.now == 110


def test_a_stopped_sleep_ends_the_wait():
    pacer = Pacer(1, sleep=lambda seconds: True, clock=Clock())
    pacer.wait()
    pacer.wait()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("3", 3.0),
        ("0.5", 0.5),
        ("soon", None),
        ("nan", None),
        ("-1", None),
        ("", None),
    ],
)
def test_retry_after(header, seconds):
    assert retry_after(header) == seconds


def test_retry_after_a_date():
    at = datetime.now(UTC) + timedelta(seconds=60)
    assert 55 < (retry_after(format_datetime(at, usegmt=True)) or 0) <= 60
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
