import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from chat_server import Response, answer, completion, serving

from dirotq.errors import ConfigError
from dirotq.evaluate.judging.answer_file import read_answers
from dirotq.evaluate.judging.asking import ask, ask_all
from dirotq.evaluate.judging.backend import Reply, Unanswered
from dirotq.evaluate.judging.questions import question_of, questions


@dataclass(frozen=True)
class Judge:
    """A judge that is a function (pair, corrections) -> text, Reply or error."""

    say: Any
    concurrency: int = 1
    name: str = "test"

    def check(self):
        pass

    @contextmanager
    def open(self, rubric, stop):
        def compare(pair, corrections):
            said = self.say(pair, corrections)
            return said if isinstance(said, Reply) else Reply(said)

        yield compare


@pytest.fixture
def asking(rubric, pair_of, tmp_path):
    """``asking(judge)``: two prompts, both orders, one repeat, unless told otherwise."""

    def asking(judge, *, prompts=2, repeats=1, attempts=2, failures=0.0):
        asked = questions(["packed"], prompts, repeats)
        return ask_all(
            judge, rubric, asked, pair_of, asking.file, attempts=attempts, failures=failures
        )

    asking.file = tmp_path / "answers.jsonl"
    return asking


def test_every_question_once_in_both_orders():
    asked = questions(["packed", "control"], 3, 2)
    assert len(set(asked)) == 3 * 2 * 2 * 2
    assert Counter(q.first for q in asked) == {"reference": 12, "candidate": 12}


def test_a_row_says_everything(asking):
    rows = asking(Judge(lambda pair, corrections: answer("A", "B")))
    assert read_answers(asking.file) == rows
    row = rows[1]
    assert {k: row[k] for k in ("comparison", "index", "first", "repeat", "prompt", "seed")} == {
        "comparison": "packed", "index": 0, "first": "candidate", "repeat": 0,
        "prompt": "prompt 0", "seed": 0,
    }  # fmt: skip
    assert (row["model"], row["outcome"], row["retries"]) == ("test", "answered", 0)
    assert row["texts"] == [answer("A", "B")]
    assert row["seconds"] >= 0
    assert row["at"]


def test_the_images_come_in_the_order_that_the_row_says(asking):
    def brighter(pair, corrections):
        return answer("A" if pair.first.mean() > pair.second.mean() else "B")

    rows = asking(Judge(brighter))
    for row in rows:
        verdict = row["answer"]["perceptual_quality"]["verdict"]
        assert verdict == ("A" if row["first"] == "candidate" else "B")


@pytest.mark.parametrize(
    ("said", "outcome", "texts"),
    [
        ("prose", "invalid", 2),
        (Reply("I won't", refused=True), "refused", 1),
        ('{"refusal": "a person"}', "refused", 1),
    ],
)
def test_no_answer_is_an_outcome_of_its_own(asking, said, outcome, texts):
    for row in asking(Judge(lambda pair, corrections: said)):
        assert (row["outcome"], row["answer"], len(row["texts"])) == (outcome, None, texts)
        assert row["detail"]


def test_retries_add_up(pair):
    def say(pair, corrections):
        if corrections:
            raise Unanswered("down", 3)
        return Reply("prose", retries=2)

    row = ask(say, pair, 5)
    assert (row["outcome"], row["detail"], row["retries"]) == ("failed", "down", 5)
    assert row["texts"] == ["prose"]


def failing(*indices):
    def say(pair, corrections):
        if pair.prompt.seed in indices:
            raise Unanswered("HTTP 500: down", 1)
        return answer()

    return say


def test_too_many_failures_stop_the_run(asking):
    with pytest.raises(ConfigError, match=r"1 of 4 questions to test failed.*HTTP 500: down"):
        asking(Judge(failing(0)))


def test_some_failures_are_counted_and_asked_again_later(asking):
    rows = asking(Judge(failing(1)), failures=0.5)
    assert Counter(r["outcome"] for r in rows) == {"answered": 2, "failed": 2}
    seen = []

    def say(pair, corrections):
        seen.append(pair.prompt.seed)
        return answer()

    rows = asking(Judge(say))
    assert seen == [1, 1]
    assert Counter(r["outcome"] for r in rows) == {"answered": 4}
    assert len(read_answers(asking.file)) == 6  # append-only: the failures are still there


def test_refusals_and_invalid_answers_are_not_asked_again(asking):
    asking(Judge(lambda pair, corrections: ["prose", '{"refusal": "no"}'][pair.prompt.seed]))
    rows = asking(Judge(lambda pair, corrections: pytest.fail("asked again")))
    assert Counter(r["outcome"] for r in rows) == {"invalid": 2, "refused": 2}


def test_an_error_keeps_the_answers_under_way(asking):
    """One thread meets a wrong request while another waits for its answer."""
    other, failed = threading.Event(), threading.Event()

    def say(pair, corrections):
        if pair.prompt.seed == 0 and not other.is_set():
            other.set()
            failed.wait(5)
            return answer("A")
        other.wait(5)
        failed.set()
        raise ConfigError("HTTP 401")

    with pytest.raises(ConfigError, match="401"):
        asking(Judge(say, concurrency=2), prompts=20)
    (row,) = read_answers(asking.file)
    assert (row["index"], row["outcome"]) == (0, "answered")


def test_every_backend_is_bounded(asking):
    lock, late = threading.Lock(), threading.Event()
    running, most = [], []

    def say(pair, corrections):
        with lock:
            running.append(1)
            most.append(len(running))
        late.wait(0.03)
        with lock:
            running.pop()
        return answer()

    asking(Judge(say, concurrency=2), prompts=6)
    assert max(most) == 2


def test_the_server_is_used_and_bounded(asking, openai):
    full, late = threading.Event(), threading.Event()

    def behave(number, body):
        if server.running == 3:
            full.set()
        full.wait(5)
        late.wait(0.03)  # a fourth one would come now
        return completion(answer())

    with serving(behave) as server:
        rows = asking(openai(base_url=server.url, concurrency=3), prompts=8)
    assert len(rows) == len(server.bodies) == 16
    assert server.most == 3


def test_a_misbehaving_server_loses_nothing(asking, openai):
    """Every third request fails in a way of its own; every question ends in an answer."""
    ways = [Response(500), Response(drop=True), completion("prose"), Response(200, "{")]

    def behave(number, body):
        return ways[number // 3 % len(ways)] if number % 3 == 0 else completion(answer("A"))

    with serving(behave) as server:
        rows = asking(openai(base_url=server.url), prompts=10, repeats=2, attempts=6)
    assert {row["outcome"] for row in rows} == {"answered"}
    extra = sum(row["retries"] + len(row["texts"]) - 1 for row in rows)
    assert len(server.bodies) == len(rows) + extra


CHILD = """
import sys, torch
from pathlib import Path
from dirotq.evaluate.judging.asking import ask_all
from dirotq.evaluate.judging.questions import Pair, questions
from dirotq.evaluate.judging.rubric import Rubric
from dirotq.evaluate.judging.server import OpenAIServer
from dirotq.sources.prompts import Prompt
backend = OpenAIServer(
    model="m", temperature=0, max_tokens=9, structured=False, extra={}, base_url=sys.argv[1],
    api_key_env=None, concurrency=4, requests_per_minute=None, timeout=20, attempts=1,
)
ask_all(
    backend, Rubric(version="1", perceptual_quality="", prompt_alignment=""),
    questions(["packed"], 8, 1),
    lambda q: Pair(Prompt(f"prompt {q.index}", q.index), *torch.zeros(2, 3, 4, 4)),
    Path(sys.argv[2]), attempts=1, failures=0,
)
"""


def test_after_a_kill_nothing_that_was_answered_is_asked_again(asking, openai, request):
    """A real process, killed for good in the middle, and a torn last line."""
    path, killed = asking.file, threading.Event()

    def behave(number, body):
        if number == 9:  # more than the run's concurrency: some answers are on disk
            process.kill()
            killed.set()
        elif number > 9:
            killed.wait(5)
        return completion(answer())

    with serving(behave) as server:
        command = [sys.executable, "-c", CHILD, server.url, str(path)]
        process = subprocess.Popen(command, cwd=request.config.rootpath)
        assert process.wait(60) == -signal.SIGKILL
    with path.open("a") as file:
        file.write('{"comparison": "pac')
    done = read_answers(path)
    assert 0 < len(done) < 16
    with serving(lambda number, body: completion(answer())) as server:
        rows = asking(openai(base_url=server.url), prompts=8)
    assert len(server.bodies) == 16 - len(done)
    assert len(rows) == 16
    on_disk = read_answers(asking.file)
    assert on_disk[: len(done)] == done
    assert len({question_of(row) for row in on_disk}) == len(on_disk) == 16
