"""Sending a question to a real server that misbehaves."""

import dataclasses
import json
import threading
import time

import pytest
from chat_server import Response, answer, completion, scripted, serving

from dirotq.errors import ConfigError
from dirotq.evaluate.judging.backend import Unanswered
from dirotq.evaluate.judging.chat import pacer


@pytest.mark.parametrize(
    "bad",
    [
        Response(500, "out of memory"),
        Response(503),
        Response(408),
        Response(429, headers={"Retry-After": "0"}),
        Response(200, "<html>gateway</html>"),
        Response(200, '{"choices": []}'),
        Response(200, '{"choices": [{"message": {"content": null}}]}'),
        Response(200, "[1]"),
        Response(drop=True),
    ],
    ids=lambda r: "dropped" if r.drop else f"{r.status} {r.body[:20]}",
)
def test_what_may_pass_is_sent_again(compare, bad):
    with serving(scripted(bad, bad, completion(answer("B")))) as server:
        reply = compare(server)
    assert (reply.text, reply.retries) == (answer("B"), 2)
    assert server.bodies[0] == server.bodies[2]


def test_what_does_not_pass_ends(compare):
    with (
        serving(scripted(Response(500, "out of memory"))) as server,
        pytest.raises(Unanswered, match="HTTP 500: out of memory") as caught,
    ):
        compare(server, attempts=4)
    assert len(server.bodies) == 4
    assert caught.value.retries == 3


def test_a_server_that_is_not_there(compare):
    with serving(scripted(Response())) as server:
        pass
    with pytest.raises(Unanswered, match=f"ConnectError at {server.url}"):
        compare(server, attempts=2)


def test_a_slow_server_times_out(compare):
    released = threading.Event()

    def slow(number, body):
        if number == 0:
            released.wait(5)
        return completion(answer())

    with serving(slow) as server:
        reply = compare(server, timeout=0.2)
        released.set()
    assert reply.retries == 1


@pytest.mark.parametrize("status", [200, 503])
def test_a_server_that_drips_times_out(compare, status):
    """No pause is longer than the limit, the whole answer is."""
    dripping = dataclasses.replace(completion(answer()), status=status, drip=0.05)
    began = time.monotonic()
    with serving(scripted(dripping, completion(answer()))) as server:
        assert compare(server, timeout=0.3).retries == 1
    assert time.monotonic() - began < 3  # the body takes 9 s


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 301])
def test_a_wrong_request_is_not_repeated(compare, status):
    with (
        serving(scripted(Response(status, "no such model"))) as server,
        pytest.raises(ConfigError, match=f"HTTP {status}: no such model.*judge.backend.model"),
    ):
        compare(server)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "response",
    [
        completion(None, refusal="I won't look at this"),
        Response(400, '{"error": {"code": "content_filter", "message": "I won\'t look"}}'),
        Response(
            200,
            json.dumps(
                {
                    "choices": [
                        {"message": {"content": "I won't"}, "finish_reason": "content_filter"}
                    ]
                }
            ),
        ),
    ],
)
def test_refusals_of_the_interface(compare, response):
    with serving(scripted(response)) as server:
        reply = compare(server)
    assert reply.refused
    assert "I won't" in reply.text
    assert len(server.bodies) == 1


def test_a_redirect_takes_the_key_nowhere(compare, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-mine")
    with serving(scripted(completion(answer()))) as other:
        away = Response(307, headers={"Location": f"{other.url}/chat/completions"})
        with serving(scripted(away)) as server, pytest.raises(ConfigError, match="HTTP 307"):
            compare(server, api_key_env="JUDGE_KEY")
    assert other.bodies == []


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for(compare, status):
    busy = Response(status, headers={"Retry-After": "0.3"})
    began = time.monotonic()
    with serving(scripted(busy, completion(answer()))) as server:
        assert compare(server).retries == 1
    assert time.monotonic() - began >= 0.3


def test_a_retry_after_of_a_day_is_a_failure(compare):
    with (
        serving(scripted(Response(429, "quota", {"Retry-After": "86400"}))) as server,
        pytest.raises(Unanswered, match="HTTP 429: quota") as caught,
    ):
        compare(server)
    assert len(server.bodies) == 1
    assert caught.value.retries == 0


def test_repetitions_count_against_the_rate_limit(compare):
    began = time.monotonic()
    with serving(scripted(Response(500), Response(500), completion(answer()))) as server:
        compare(server, requests_per_minute=600)
    assert time.monotonic() - began >= 0.2  # three requests, a tenth of a second apart


def test_once_stopped_nothing_is_sent_again(compare):
    stop = threading.Event()

    def behave(number, body):
        stop.set()
        return Response(500, "down")

    with serving(behave) as server, pytest.raises(Unanswered):
        compare(server, stop=stop, attempts=9)
    assert len(server.bodies) == 1


class Waits(threading.Event):
    """Nobody waits; how long each one would have."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def wait(self, timeout=None):
        self.seconds.append(timeout)
        return self.is_set()


def test_requests_are_spaced_evenly():
    stop = Waits()
    wait = pacer(6, stop)
    for _ in range(4):
        wait(None)
    assert stop.seconds == pytest.approx([0, 10, 20, 30], abs=0.5)


def test_idle_time_is_no_credit_for_a_burst():
    stop = Waits()
    wait = pacer(600, stop)
    time.sleep(0.25)  # two and a half intervals
    for _ in range(2):
        wait(None)
    assert stop.seconds == pytest.approx([0, 0.1], abs=0.05)


def test_the_limit_holds_for_all_threads_together():
    stop = Waits()
    wait = pacer(6, stop)
    threads = [threading.Thread(target=lambda: [wait(None) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(stop.seconds) == pytest.approx([10 * i for i in range(20)], abs=0.5)


def test_without_a_limit_nobody_waits():
    stop = Waits()
    wait = pacer(None, stop)
    for _ in range(5):
        wait(None)
    assert max(stop.seconds) <= 0


def test_a_stopped_run_ends_the_wait():
    stop = threading.Event()
    wait = pacer(1, stop)
    wait(None)
    stop.set()
    with pytest.raises(Unanswered, match="stopped"):
        wait(None)
