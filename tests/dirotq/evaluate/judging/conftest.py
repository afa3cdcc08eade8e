"""Questions about small random images, and what the real configuration tree says."""

import dataclasses
import threading
from collections.abc import Sequence

import pytest
import torch
from hydra.utils import instantiate

from dirotq.evaluate.judging.questions import Pair, Question
from dirotq.evaluate.judging.rubric import Rubric
from dirotq.evaluate.judging.server import OpenAIServer
from dirotq.pipeline.config import compose_config
from dirotq.sources.prompts import Prompt


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """The client's pauses between repetitions, a thousandth as long."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.0005)


@pytest.fixture(scope="session")
def rubric() -> Rubric:
    return instantiate(compose_config([], "dirotq.conf").rubric)


@pytest.fixture(scope="session")
def openai():
    """The backend of conf/judge/openai.yaml, with fields replaced."""
    overrides = ["pipeline=judged", "judge=openai", "judge.backend.model=looker"]
    node = compose_config(overrides, "dirotq.conf").judge.backend
    built: OpenAIServer = instantiate(node, _convert_="all")

    def build(**changes) -> OpenAIServer:
        return dataclasses.replace(built, **{"timeout": 10} | changes)

    return build


@pytest.fixture
def compare(rubric, pair, openai):
    """``compare(server, **settings)``: one question through the real client."""

    def compare(server, *, corrections=(), stop=None, **settings):
        stop = stop or threading.Event()
        with openai(base_url=server.url, **settings).open(rubric, stop) as compare:
            return compare(pair, list(corrections))

    return compare


@pytest.fixture
def pair() -> Pair:
    first, second = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return Pair(Prompt("a red square", 7), first, second)


@pytest.fixture
def pair_of():
    """Images whose brightness says which side they are: 0 the reference, 1 the candidate."""
    sides = {"reference": torch.zeros(3, 4, 4), "candidate": torch.ones(3, 4, 4)}

    def pair_of(question: Question) -> Pair:
        order: Sequence[str] = ("reference", "candidate")
        if question.first == "candidate":
            order = order[::-1]
        return Pair(Prompt(f"prompt {question.index}", question.index), *(sides[s] for s in order))

    return pair_of
