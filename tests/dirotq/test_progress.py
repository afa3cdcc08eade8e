import io
import logging
import time

import pytest
from rich.console import Console

from dirotq import progress


@pytest.fixture
def hurried(monkeypatch):
    """Two seconds pass in two hundredths."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.02)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)


def slowly(items):
    for item in items:
        time.sleep(0.01)
        yield item


def terminal(monkeypatch) -> io.StringIO:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    monkeypatch.setattr(progress, "_console", lambda: console)
    return written


def test_items_come_through_unchanged():
    assert list(progress.track(range(5), "x")) == list(range(5))
    assert list(progress.track(iter("abc"), "x", total=3)) == list("abc")


def test_quick_work_is_silent(monkeypatch, caplog):
    caplog.set_level("INFO")
    list(progress.track(range(1000), "x"))
    assert not caplog.records
    written = terminal(monkeypatch)
    list(progress.track(range(1000), "x"))
    assert "x" not in written.getvalue()


def test_plain_lines_have_an_eta_and_an_end(hurried, caplog):
    caplog.set_level("INFO")
    list(progress.track(slowly(range(30)), "sites", total=30))
    said = [record.getMessage() for record in caplog.records]
    assert 2 <= len(said) <= 12
    assert all("/30, 0:0" in line and line.endswith("left") for line in said[:-1])
    assert said[-1].startswith("sites 30/30 in 0:0")


def test_plain_lines_without_a_total(hurried, caplog):
    caplog.set_level("INFO")
    list(progress.track(slowly(range(30)), "sites"))
    assert all("left" not in record.getMessage() for record in caplog.records)
    assert caplog.records[-1].getMessage().startswith("sites 30 in")


def test_bar_shows_itself_during_a_long_first_item(hurried, monkeypatch):
    written = terminal(monkeypatch)
    loop = iter(progress.track(range(2), "sites"))
    next(loop)
    time.sleep(0.1)
    assert "sites" in written.getvalue()
    assert "0/2" in written.getvalue()
    assert list(loop) == [1]


def test_bar_goes_away_when_the_loop_breaks(hurried, monkeypatch):
    terminal(monkeypatch)
    for _ in progress.track(range(2), "sites"):
        time.sleep(0.1)
        break
    list(progress.track(slowly(range(5)), "again"))  # rich allows one live display at a time


def test_log_handler_fits_the_console(monkeypatch):
    assert type(progress.log_handler()) is logging.StreamHandler
    terminal(monkeypatch)
    assert type(progress.log_handler()).__name__ == "RichHandler"


def test_what_a_verb_waits_for_is_told(capsys):
    log = logging.getLogger("dirotq.runtime.compiled")
    with progress.told("dirotq.runtime"):
        log.info("compiling Block")
        log.debug("a detail")
    log.info("said too late")
    said = capsys.readouterr().err
    assert "compiling Block" in said
    assert "detail" not in said and "too late" not in said
    assert not logging.getLogger("dirotq.runtime").handlers
