"""The attribute reader as judge, on renderings of scenes."""

import threading

import pytest
import torch

from dirotq.assets.captions import attributes_of
from dirotq.assets.scenes import render, sample_scenes
from dirotq.errors import ConfigError
from dirotq.evaluate.attribute_judge import AttributeJudge
from dirotq.evaluate.judging.answer import Answer, parse_answer
from dirotq.evaluate.judging.questions import Pair
from dirotq.evaluate.judging.reader import ReaderJudge
from dirotq.sources.prompts import Prompt


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(6, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def judge():
    return ReaderJudge(reader=AttributeJudge(path="assets://attribute-reader"))


@pytest.fixture
def verdicts(judge, rubric):
    """What it says about (prompt, first image, second image): quality, alignment."""

    def verdicts(prompt, first, second):
        with judge.open(rubric, threading.Event()) as compare:
            answer = parse_answer(compare(Pair(prompt, first, second), []).text)
        assert isinstance(answer, Answer)
        return answer.perceptual_quality.verdict, answer.prompt_alignment.verdict

    return verdicts


def test_the_scene_of_the_caption_wins_in_both_orders(verdicts, scenes):
    images = render(scenes)
    for index, other in ((0, 1), (2, 3), (4, 5)):
        prompt = Prompt("a scene", 0, attributes_of(scenes[index]))
        assert verdicts(prompt, images[index], images[other]) == ("tie", "A")
        assert verdicts(prompt, images[other], images[index]) == ("tie", "B")


def test_what_shows_the_same_attributes_ties(verdicts, scenes):
    image = render(scenes)[0]
    prompt = Prompt("a scene", 0, attributes_of(scenes[0]))
    assert verdicts(prompt, image, image * 0.999) == ("tie", "tie")


def test_prompts_without_attributes_need_another_judge(verdicts, scenes):
    image = render(scenes)[0]
    with pytest.raises(ConfigError, match=r"carr(y|ies) no 'attributes'"):
        verdicts(Prompt("a cat", 0), image, image)


def test_no_reader():
    with pytest.raises(ConfigError, match=r"prompts\.reader is null.*judge=openai or judge=local"):
        ReaderJudge(reader=None)
