"""The OpenAI-compatible backend against a real server that misbehaves."""

import base64
import io
import json
import threading

import pytest
import torch
from chat_server import Response, answer, completion, serving
from PIL import Image

from dirotq.errors import ConfigError
from dirotq.evaluate.judging import server as module
from dirotq.evaluate.judging.asking import ask
from dirotq.evaluate.judging.backend import Unanswered
from dirotq.evaluate.judging.pacing import Pacer
from dirotq.evaluate.judging.pair import Correction

KEY = "sk-a-key-nobody-may-see"


@pytest.fixture
def compare(rubric, pair, openai):
    """``compare(server, **settings)``: one question through the real client."""

    def compare(server, *, corrections=(), stop=None, **settings):
        stop = stop or threading.Event()
        with openai(base_url=server.url, **settings).open(rubric, stop) as compare:
            return compare(pair, list(corrections))

    return compare


def scripted(*responses):
    """Each response once, the last one for ever."""
    return lambda number, body: responses[min(number, len(responses) - 1)]


def test_what_is_sent(compare, pair):
    with serving(scripted(completion(answer("A")))) as server:
        reply = compare(server, extra={"top_p": 0.9}, max_tokens=None)
    assert (reply.text, reply.refused, reply.retries) == (answer("A"), False, 0)
    assert server.paths == ["/v1/chat/completions"]
    (body,) = server.bodies
    assert body.keys() == {"model", "messages", "temperature", "response_format", "top_p"}
    assert body["model"] == "looker"
    assert body["response_format"]["json_schema"]["schema"]["required"]
    system, user = body["messages"]
    assert isinstance(system["content"], str)
    urls = [p["image_url"]["url"] for p in user["content"] if p["type"] == "image_url"]
    for url, image in zip(urls, (pair.first, pair.second), strict=True):
        head, data = url.split(",")
        assert head == "data:image/png;base64"
        sent = torch.tensor(list(Image.open(io.BytesIO(base64.b64decode(data))).tobytes()))
        assert torch.equal(sent.view(8, 8, 3), (image * 255).round().permute(1, 2, 0).long())


def test_unstructured(compare):
    with serving(scripted(completion(answer()))) as server:
        compare(server, structured=False)
    assert "response_format" not in server.bodies[0]


def test_corrections_are_part_of_the_conversation(compare):
    with serving(scripted(completion(answer()))) as server:
        compare(server, corrections=[Correction("rubbish", "it is no JSON")])
    assistant, user = server.bodies[0]["messages"][2:]
    assert assistant == {"role": "assistant", "content": "rubbish"}
    assert "it is no JSON" in user["content"]


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


def test_a_dripping_server_times_out(compare):
    """Each byte comes in time, the answer never would."""
    pause = threading.Event()
    dripping = completion(answer())
    dripping.drip = lambda: pause.wait(0.03)
    with serving(scripted(dripping, completion(answer("A")))) as server:
        reply = compare(server, timeout=0.2)
        pause.set()
    assert (reply.text, reply.retries) == (answer("A"), 1)


def test_an_endless_answer_is_cut_off(compare):
    with (
        serving(scripted(Response(200, "x" * (3 << 20)))) as server,
        pytest.raises(Unanswered, match="more than 1048576 bytes"),
    ):
        compare(server, attempts=1)


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


class RecordingPacer(Pacer):
    """Holds and waits are counted, and nobody sleeps."""

    held: list[float]
    waits: int

    def __init__(self, per_minute, *, sleep):
        super().__init__(per_minute, sleep=self._sleep, clock=lambda: self.time)
        RecordingPacer.made = self
        self.held, self.waits, self.time = [], 0, 0.0

    def _sleep(self, seconds):
        self.time += seconds

    def wait(self):
        self.waits += 1
        super().wait()

    def hold(self, seconds):
        self.held.append(seconds)
        super().hold(seconds)


@pytest.fixture
def recording(monkeypatch):
    RecordingPacer.time = 0.0
    monkeypatch.setattr(module, "Pacer", RecordingPacer)
    return RecordingPacer


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_holds_every_request(compare, recording, status):
    busy = Response(status, headers={"Retry-After": "21"})
    with serving(scripted(busy, completion(answer()))) as server:
        compare(server)
    assert recording.made.held == [21.0]
    assert recording.made.time == 21.0


def test_a_retry_after_of_a_day_is_a_failure(compare, recording):
    with (
        serving(scripted(Response(429, "quota", {"Retry-After": "86400"}))) as server,
        pytest.raises(Unanswered, match=r"HTTP 429: quota.*wait 86400 s.*max_wait=300"),
    ):
        compare(server)
    assert len(server.bodies) == 1


def test_repetitions_count_against_the_rate_limit(compare, recording):
    with serving(scripted(Response(500), Response(500), completion(answer()))) as server:
        compare(server, requests_per_minute=6)
    assert recording.made.waits == 3
    assert recording.made.time == pytest.approx(20)  # three requests, ten seconds apart


def test_once_stopped_nothing_is_sent_again(compare):
    stop = threading.Event()

    def behave(number, body):
        stop.set()
        return Response(500, "down")

    with serving(behave) as server, pytest.raises(Unanswered):
        compare(server, stop=stop, backoff=60, attempts=9)
    assert len(server.bodies) == 1


def test_the_key_is_sent_and_shown_nowhere(compare, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        serving(scripted(Response(401, f"Incorrect API key provided: {KEY}"))) as server,
        pytest.raises(ConfigError) as caught,
        caplog.at_level(0),
    ):
        compare(server, api_key_env="JUDGE_KEY")
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert "Incorrect API key provided: ***" in str(caught.value)
    assert KEY not in caplog.text
    with serving(scripted(completion(f"you sent {KEY}"))) as server:
        assert compare(server, api_key_env="JUDGE_KEY").text == "you sent ***"


def test_without_a_key_none_is_sent(compare):
    with serving(scripted(completion(answer()))) as server:
        compare(server)
    assert "Authorization" not in server.headers[0]


def test_a_key_that_is_not_set(openai, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="JUDGE_KEY, and that environment variable is not set"):
        openai(api_key_env="JUDGE_KEY").check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, "is no address"),
        ({"base_url": "ftp://host/v1"}, "is no address"),
        ({"base_url": f"http://me:{KEY}@host/v1"}, "carries a user name"),
        ({"base_url": f"http://host/v1?key={KEY}"}, "carries a user name"),
        ({"api_key_env": KEY}, "no name of an environment variable"),
        ({"concurrency": 0}, "concurrency=0: use at least 1"),
        ({"attempts": 0}, "attempts=0: use at least 1"),
        ({"timeout": 0}, "timeout=0: use more than 0"),
        ({"requests_per_minute": 0}, "requests_per_minute=0: use more than 0"),
    ],
)
def test_settings_out_of_range(openai, changes, message):
    with pytest.raises(ConfigError) as caught:
        openai(**changes)
    assert message in str(caught.value)
    assert KEY not in str(caught.value)


def test_wrong_answers_go_back_until_one_passes(rubric, pair, openai):
    """Prose, torn JSON, JSON of the wrong shape, then an answer."""
    texts = ["I prefer A.", answer()[:-9], '{"perceptual_quality": "A"}', answer("A", "B")]
    with (
        serving(lambda number, body: completion(texts[number])) as server,
        openai(base_url=server.url).open(rubric, threading.Event()) as compare,
    ):
        row = ask(compare, pair, 4)
    assert row["outcome"] == "answered"
    assert row["texts"] == texts
    assert row["answer"]["prompt_alignment"]["verdict"] == "B"
    last = json.dumps(server.bodies[3]["messages"])
    assert all(json.dumps(text)[1:-1] in last for text in texts[:3])
    assert "prompt_alignment: Field required" in last
