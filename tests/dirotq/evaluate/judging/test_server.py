"""The OpenAI-compatible backend: its settings, and what a real server gets to see."""

import base64
import importlib.util
import io
import json
import threading

import pytest
import torch
from chat_server import Response, answer, completion, scripted, serving
from PIL import Image

from dirotq.errors import ConfigError
from dirotq.evaluate.judging.asking import ask
from dirotq.evaluate.judging.backend import Unanswered
from dirotq.evaluate.judging.questions import Correction

KEY = "sk-a-key-nobody-may-see"


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


def test_the_key_is_sent_and_shown_nowhere(compare, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        serving(scripted(Response(401, f"Incorrect API key provided: {KEY}"))) as server,
        pytest.raises(ConfigError) as caught,
        caplog.at_level(0),
    ):
        compare(server, api_key_env="JUDGE_KEY")
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "Incorrect API key provided: ***" in str(caught.value)
    assert KEY not in caplog.text
    with serving(scripted(completion(f"you sent {KEY}"))) as server:
        assert compare(server, api_key_env="JUDGE_KEY").text == "you sent ***"


def test_no_part_of_the_key_is_left_where_a_message_is_cut(compare, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        serving(scripted(Response(200, KEY * 50))) as server,  # wherever it is cut, there is one
        pytest.raises(Unanswered, match="no chat completion") as caught,
    ):
        compare(server, api_key_env="JUDGE_KEY", attempts=1)
    assert KEY[:2] not in str(caught.value)


def test_a_key_that_is_a_word_of_the_protocol_hides_no_answer(compare, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "choices")
    with serving(scripted(completion(answer()))) as server:
        assert compare(server, api_key_env="JUDGE_KEY").text == answer()


def test_without_a_key_none_is_sent(compare, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # for somebody else
    with serving(scripted(completion(answer()))) as server:
        compare(server)
    assert KEY not in str(server.headers)
    assert "authorization" not in server.headers[0]


def test_a_key_that_is_not_set(openai, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="JUDGE_KEY, and that environment variable is not set"):
        openai(api_key_env="JUDGE_KEY").check()


def test_the_package_is_an_extra(openai, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dirotq\[judge\]'"):
        openai().check()


@pytest.mark.parametrize("key", [f"{KEY}\nanother", f"{KEY} ", "schlüssel"])
def test_a_key_that_no_header_can_carry(openai, monkeypatch, key):
    """A client would repeat it in its error. Blanks around it are no fault."""
    monkeypatch.setenv("JUDGE_KEY", key)
    if key.strip() == KEY:
        return openai(api_key_env="JUDGE_KEY").check()
    with pytest.raises(ConfigError, match=r"JUDGE_KEY, and that .* holds no key") as caught:
        openai(api_key_env="JUDGE_KEY").check()
    assert key not in str(caught.value)


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
