import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirotq.errors import ConfigError
from dirotq.pipeline import wording
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.settings import fits, refuse_misfit

REAL, TOY = "dirotq.conf", "toyline.conf"


class Shape(Protocol):
    def area(self) -> float: ...


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (1, int, True), (True, int, False), (1.0, int, False), ("1", int, False),
        (1, float, True), (0.5, float, True), (True, float, False), (math.nan, float, False),
        (-math.inf, float, False), ("x", str, True), (1, str, False), (True, bool, True),
        (1, bool, False), (None, int | None, True), ("x", int | None, False),
        (4, Literal[4, 8], True), (True, Literal[1], False), (4.0, Literal[4, 8], False),
        ("a", Literal["a", "b"], True), ([1, 2], list[int], True), ([1, "2"], list[int], False),
        ("ab", Sequence[str], False), (["a"], Sequence[str], True), ({"a": 1}, list[int], False),
        ({"a": 1}, Mapping[str, int], True), ({"a": None}, Mapping[str, int | None], True),
        ({"a": "x"}, Mapping[str, float], False), ([], Mapping[str, Any], False),
        (object(), Any, True), ("text", Shape, False), (object(), Shape, True),
    ],
)  # fmt: skip
def test_annotations_are_types(value, hint, right):
    assert fits(value, hint) is right


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()))
def test_a_misfit_says_what_it_is_and_what_is_allowed(value):
    if fits(value, int | None):
        refuse_misfit(value, int | None, "a.b")
        return
    with pytest.raises(ConfigError, match=r"a\.b=.* does not fit: it is .*a whole number or null"):
        refuse_misfit(value, int | None, "a.b")


def test_the_place_inside_of_a_mapping_is_named():
    with pytest.raises(ConfigError, match=r"^model\.call\.steps='x' does not fit"):
        refuse_misfit({"steps": "x"}, Mapping[str, float | None], "model.call")
    with pytest.raises(ConfigError, match=r"^force\[1\]=3 does not fit"):
        refuse_misfit(["a", 3], str | list[str], "force")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "rank.r=abc",
            r"rank\.r='abc' does not fit: it is text, allowed is a whole number or",
        ),
        (
            "validate.pairs=1.5",
            r"validate\.pairs=1\.5 does not fit: it is a number with a fr",
        ),
        ("weights=", r"weights is empty; give a folder"),
        ("capture.calls=1.5", r"capture\.calls=1\.5 does not fit"),
        ("capture.rows=true", r"capture\.rows=true does not fit: it is a truth value"),
        ("gptq.damping=nan", r"gptq\.damping=nan does not fit: it is no finite number"),
        ("fuse.layer_tolerance=inf", r"fuse\.layer_tolerance=inf does not fit"),
        ("gptq.inputs=exact", r"gptq\.inputs: there is no such setting"),
        ("method.protect=false", r"write method\.branch=null, which protects nothing"),
        (
            "act_format.element=int5",
            r"act_format\.element='int5' does not fit.*'int4' or 'lzs' or 'int8'",
        ),
        ("transform.smooth=1", r"transform\.smooth=1 does not fit.*true or false"),
        ("act_format.element=int8", r"act_format: 8-bit activations with power-of-two"),
        ("branch.bits=4", r"branch\.bits=4 does not fit.*8 or 16"),
        ("method.act_scale=token", r"method\.act_scale:.*any more; write act_format=int4_token"),
        ("+method.act_scale=token", r"method\.act_scale:.*any more; write act_format=int4_token"),
        ("method.block=16", r"method\.block:.*write transform\.block=16"),
        ("prompts.heldout.column=1", r"as text it is written \"prompts\.heldout\.column='1'\""),
        ("prompts.calibration.count=x", r"prompts\.calibration\.count='x' does not fit"),
        ("preflight=maybe", r"preflight='maybe' does not fit.*true or false"),
        ("rank.grid=0", r"rank\.grid=0: use at least 1"),
        ("capture.rows=-1", r"capture\.rows=-1: each must be at least 1"),
        ("device=bogus", r"device=bogus is unknown; use auto, cpu, cuda or cuda:N"),
        ("gptq.device=tpu", r"gptq\.device=tpu is unknown"),
        ("+methd=rtn", r"methd: there is no such setting; did you mean `method`\?"),
        ("methd=rtn", r"methd: there is no such setting; did you mean `method`\?"),
        ("+rank.rr=1", r"rank\.rr: there is no such setting; did you mean `rank\.r`\?"),
        ("++rank.rr=1", r"rank\.rr: there is no such setting"),
        ("+prompts.held_out=1", r"prompts\.held_out: there is no such setting"),
        ("+prompts.heldout.cout=1", r"did you mean `prompts\.heldout\.count`\?"),
        ("+judge.bogus=1", r"judge\.bogus: there is no such setting"),
        ("+workload.bogus=1", r"workload\.bogus: there is no such setting"),
        ("model.call=7", r"model\.call=7 does not fit"),
        ("+model.call.bogus=1", r"model\.call\.bogus: FluxPipeline takes no such argument"),
        ("+model.call.num_inference_steps=0", r"num_inference_steps=0: use a whole number from 1"),
        ("+model.call.num_inference_steps=1.5", r"num_inference_steps=1\.5: use a whole number"),
        ("+model.call.guidance_scale=inf", r"model\.call\.guidance_scale=inf does not fit"),
        ("+model.call.generator=1", r"DiRotQ gives generator itself"),
        ("+model.sample.bogus=1", r"model\.sample\.bogus: FluxPipeline takes no such argument"),
        ("+model.sample.height=0", r"model\.sample\.height=0: use a whole number from 1"),
        ("+model.sample.prompt=x", r"model\.sample\.prompt: DiRotQ gives prompt itself"),
        ("model.sample=7", r"model\.sample=7 does not fit"),
        ("rank=64", r"its choices are budget, .*; the number itself is rank\.r=64"),
        ("method=RTN", r"method=RTN: there is no such choice; did you mean `rtn`\?"),
        ("prompts=a/b.jsonl", r"prompts=a/b\.jsonl: .*prompts\.calibration\.path=FILE"),
        ("model.call=[1]", r"model\.call is a mapping, no list: write \+model\.call\.NAME=VALUE"),
        ("pack.shard=2", r"pack\.shard: 2 is 2 bytes"),
        ("metrics=nix", r"metrics=nix: there is no such choice; metrics has clip_score, fid"),
    ],
)
def test_a_wrong_setting_of_the_real_line_is_refused_before_anything_runs(
    override, says, store_root
):
    with pytest.raises(ConfigError, match=says):
        build(compose_config(["model=tiny_flux", override], REAL))
    assert not store_root.exists()


@pytest.mark.parametrize(
    ("choice", "override", "has"),
    [
        ("rank=budget", "rank.sensitivity=equal", "rank has batch, bits, "),
        ("judge=openai", "judge.backend.backoff=1", "judge.backend has api_key_env, attempts, "),
    ],
)
def test_settings_that_there_are_are_those_of_the_chosen_group(choice, override, has):
    with pytest.raises(ConfigError, match=has):
        build(compose_config(["model=tiny_flux", choice, override], REAL))


def test_a_launcher_that_is_not_installed_names_its_extra(monkeypatch):
    """Whatever is installed here: the launcher exists nowhere."""
    monkeypatch.setitem(wording.EXTRAS, "nowhere", "slurm")
    with pytest.raises(ConfigError, match=r"no such choice; .* pip install 'dirotq\[slurm\]'"):
        build(compose_config(["hydra/launcher=nowhere"], REAL))
    assert {"joblib", "submitit_local", "submitit_slurm"} <= wording.EXTRAS.keys()


def test_every_class_of_the_tree_has_annotations_that_can_be_read():
    for choice in ([], ["rank=budget"], ["method=svdquant"], ["pipeline=judged"]):
        build(compose_config(["model=tiny_flux", *choice], REAL))


@pytest.mark.parametrize(
    "override", ["squares._target_=nix.Nix", "squares._target_=os.nix", "squares._target_=os.sep"]
)
def test_a_class_that_is_none(override):
    with pytest.raises(ConfigError, match=r"squares\._target_=.* is no class"):
        build(compose_config([override], TOY))


def test_files_of_users_may_not_add_settings_either(dirotq, tmp_path):
    (tmp_path / "total").mkdir()
    mine = "# @package _global_\ntotal: {_target_: toyline.stages.Total}\nsquare: 3\n"
    (tmp_path / "total" / "mine.yaml").write_text(mine)
    found = dirotq("compress", "--config-dir", str(tmp_path), "total=mine")
    assert found.status == 2
    assert "square: there is no such setting; did you mean `squares`?" in found.err
