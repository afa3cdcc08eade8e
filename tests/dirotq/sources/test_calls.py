import math

import pytest

from dirotq.errors import ConfigError
from dirotq.sources.calls import refuse_call


class Pipeline:
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 3.5,
        sigmas: list[float] | None = None,
        clean: bool = True,
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
    ],
)
def test_what_does_not_is_named(call, says):
    with pytest.raises(ConfigError, match=says):
        refuse_call(Pipeline, call, "model.call")
