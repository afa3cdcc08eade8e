import math

import pytest

from dirotq.errors import ConfigError
from dirotq.sources.calls import refuse_call, refuse_mixed, refuse_prompts
from dirotq.sources.prompts import Prompt


class Pipeline:
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        sigmas: list[float] | None = None,
        clean: bool = True,
        num_images_per_prompt: int = 1,
        generator: object = None,
    ):
        raise NotImplementedError


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"num_inference_steps": 1},
        {"guidance_scale": 4},
        {"sigmas": [1.0, 0.5]},
        {"clean": False},
        {"guidance_scale": None},
        {"num_images_per_prompt": 1},
    ],
)
def test_what_fits_passes(call):
    refuse_call(Pipeline, call, "model.call")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"guidence_scale": 4}, r"takes no such argument; did you mean `guidance_scale`\?"),
        ({"num_inference_steps": 0}, r"model\.call\.num_inference_steps=0: use a whole number"),
        ({"num_inference_steps": True}, r"num_inference_steps=True: use a whole number"),
        ({"guidance_scale": math.nan}, r"guidance_scale=nan does not fit"),
        ({"guidance_scale": "high"}, r"guidance_scale='high' does not fit"),
        ({"clean": 1}, r"clean=1 does not fit.*true or false"),
        ({"prompt": "x"}, r"DiRotQ gives prompt itself"),
        ({"num_images_per_prompt": 3}, r"num_images_per_prompt=3: DiRotQ makes one of each prompt"),
    ],
)
def test_what_does_not_is_named(call, says):
    with pytest.raises(ConfigError, match=says):
        refuse_call(Pipeline, call, "model.call")


def test_prompts_of_one_call_have_the_same_columns():
    rows = [Prompt("a", 0, negative="dark"), Prompt("b", 1, negative=""), Prompt("c", 2)]
    refuse_mixed(rows[:2], "x.jsonl")
    refuse_mixed(rows[2:], "x.jsonl")
    with pytest.raises(ConfigError, match=r"x\.jsonl: the prompt 'c' has no negative_prompt"):
        refuse_mixed(rows, "x.jsonl")
    pictured = Prompt("d", 3, inputs={"image": "d.png"})
    with pytest.raises(ConfigError, match="the prompt 'c' has no image"):
        refuse_mixed([pictured, rows[2]], "x.jsonl")


class Distilled:
    """As FLUX.1's: its guidance_scale is an input, and a negative prompt needs another scale."""

    def __call__(self, prompt, negative_prompt=None, true_cfg_scale: float = 1.0):
        raise NotImplementedError


def test_negative_prompts_that_nothing_reads():
    rows = [Prompt("a", 0), Prompt("b", 1, negative="dark")]
    with pytest.raises(ConfigError, match=r"'b' has a negative_prompt, which a Distilled reads .*"):
        refuse_prompts(Distilled, rows, "x.jsonl", {})
    with pytest.raises(ConfigError, match="true_cfg_scale above 1, and it is 1: set"):
        refuse_prompts(Distilled, rows, "x.jsonl", {"true_cfg_scale": 1})
    refuse_prompts(Distilled, rows, "x.jsonl", {"true_cfg_scale": 1.5})
    refuse_prompts(Distilled, rows[:1], "x.jsonl", {})
