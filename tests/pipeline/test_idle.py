import re

import pytest

from dirotq.errors import ConfigError
from dirotq.pipeline.config import compose_config


def composed(words: str):
    return compose_config(words.split(), "dirotq.conf")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("judge=attributes", "the stage judge, which this pipeline leaves out"),
        ("judge.repeats=3 until=pack", "Leave it out, or choose pipeline=judged"),
        ("round.least_packed=0.3", "Leave it out, or choose pipeline=instant"),
        ("rubric.version=2", "rubric, which no stage reads with this pipeline"),
        ("method=rtn branch.bits=8", "branch, which no stage reads with method=rtn"),
        ("pipeline=instant gptq.damping=0.1", "the stage gptq, which pipeline=instant leaves out"),
        ("preset=instant prompts.calibration.count=3", "no stage reads with preset=instant"),
        ("preset=instant prompts.heldout.count=3", "no stage reads with preset=instant"),
        ("preset=instant reference.batch=3", "the stage reference, before which preset=instant"),
        ("preset=instant metrics=lpips", "Leave one of the two out, or add until=validate"),
        ("method=rtn gptq.damping=0.1", "read with method.rounding=gptq alone, and here"),
        ("method=svdquant basis.alpha=0.3", "basis.smoothing=fixed alone, and here"),
        ("method=smoothquant basis.candidates=3", "basis.smoothing=grid alone"),
        ("method=svdquant basis.regularization=0.1", "basis.branch=weighted alone"),
    ],
)
def test_what_no_stage_reads_is_refused(words, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        composed(words)


@pytest.mark.parametrize(
    "words",
    [
        "pipeline=judged judge.repeats=3 rubric.version=2",
        "branch.bits=8 method=dirotq",
        "until=reference prompts.calibration.count=3",  # the next command may go on
        "preset=instant until=validate prompts.calibration.count=3",
        "preset=instant until=validate reference.batch=3 metrics=lpips prompts.heldout.count=3",
        "preset=instant until=pack reference.batch=3",  # the user's own: the next command goes on
        "method=rtn method.rounding=gptq gptq.damping=0.1",
        "method=smoothquant basis.alpha=0.3",
        "method=svdquant basis.candidates=3",
        "method=absorb basis.regularization=0.1",
    ],
)
def test_what_a_stage_reads_passes(words):
    assert composed(words)
