"""How much the line runs a model of itself: counts, and the boundary from which less is advised."""

from types import SimpleNamespace

import pytest
from hydra.utils import instantiate
from published_shapes import write_shapes

from dirotq.pipeline.config import compose_config
from dirotq.pipeline.machine import Machine
from dirotq.quantize.arithmetic import MUCH, VIDEO, told

HERE = Machine(name="NVIDIA H200", vram=150 * 10**9, ram=256 * 10**9)
STAGES = ("capture", "rank", "fuse", "reference", "validate")
WAN22 = (
    "+model.call.num_inference_steps=40", "+model.call.height=720", "+model.call.width=1280",
    "+model.call.guidance_scale=4.0",
)  # fmt: skip


@pytest.fixture(autouse=True)
def only_shapes_count(monkeypatch):
    """The folders here hold the configurations of full-size models, and none of their weights."""
    monkeypatch.setattr("dirotq.sources.origin.refuse_incomplete", lambda *_, **__: None)


def line(*words):
    """The workload, and the forwards of all stages."""
    cfg = compose_config(list(words), "dirotq.conf")
    work, forwards = instantiate(cfg.workload, _convert_="all"), {}
    for name in STAGES:
        stage = instantiate(cfg[name], _convert_="all")
        forwards |= stage.needs(work, HERE).forwards
    return work, forwards


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return write_shapes("wan22", tmp_path_factory.mktemp("wan") / "wan22")


def test_wan_22_by_default_as_images_are(wan):
    work, forwards = line(f"model={wan}", *WAN22)
    counts = {what: count for what, (count, _) in forwards.items()}
    assert counts == {
        "record": 24 * 40 * 2, "replay": 512, "sensitive sites": 10 * 4 * 2 * 4,
        "fuse's proof": 2 * 2 * 4, "reference": 2 * 8 * 40 * 2, "validate": 8 * 40 * 2,
    }  # fmt: skip
    assert work.image_tokens == 75_600
    linears = 2 * 75_600 * 40 * (6 * 5120**2 + 2 * 5120 * 13824)
    attention = 4 * 75_600 * (2 * 75_600 + 512) / 2 * 5120 * 40
    assert work.forward_flops == pytest.approx(linears + attention, rel=0.02)
    assert forwards["record"][1] == 1920 * work.forward_flops
    assert 1 < forwards["replay"][1] / (512 * work.forward_flops) < 1.5  # second moments too
    said, advice = told(work, forwards)
    assert "record 1,920 (12,525 PFLOP)" in said
    assert "720 x 1280 x 81 frames, 75,600 tokens each" in said
    assert VIDEO in advice


def test_wan_22_by_its_configuration_takes_minutes(wan):
    work, forwards = line("model=video", f"model.path={wan}", *WAN22)
    counts = {what: count for what, (count, _) in forwards.items()}
    assert counts == {
        "record": 4 * 40 * 2, "replay": 128, "sensitive sites": 10 * 4 * 2,
        "fuse's proof": 2 * 2, "reference": 2 * 2 * 40 * 2, "validate": 2 * 40 * 2,
    }  # fmt: skip
    assert work.image_tokens == 10_920
    [said] = told(work, forwards)  # nothing to advise
    assert said.endswith("together 388 PFLOP")


def test_flux_by_default_is_told_no_advice(tmp_path):
    work, forwards = line(f"model={write_shapes('flux', tmp_path / 'flux')}")
    assert sum(flops for _, flops in forwards.values()) < MUCH / 4
    assert len(told(work, forwards)) == 1


def test_a_measuring_rank_counts_its_images(tmp_path):
    folder = write_shapes("flux", tmp_path / "flux")
    _, forwards = line(f"model={folder}", "rank=budget", "rank.gate=4", "rank.sensitive=null")
    assert forwards["rank's images"][0] == 3 * 4 * 28
    assert forwards["sensitive sites"][0] == 10 * 4 * 4  # all sites, once
    _, ungated = line(f"model={folder}", "rank=budget", "rank.gate=0")
    assert "rank's images" not in ungated
    _, fixed = line(f"model={folder}", "rank.sensitive=null")
    assert "sensitive sites" not in fixed
    for asked in ("auto", "{count: 3, act_bits: 8}"):  # both precisions take one pass
        _, counted = line(f"model={folder}", f"rank.sensitive={asked}")
        assert counted["sensitive sites"] == forwards["sensitive sites"]


@pytest.mark.parametrize(("size", "videos"), [((64, 64, 1), False), ((64, 64, 5), True)])
def test_advice_begins_at_the_boundary(size, videos):
    work = SimpleNamespace(size=size, image_tokens=16)
    assert len(told(work, {"record": (1, MUCH / 2), "replay": (1, 0.49 * MUCH)})) == 1
    _, advice = told(work, {"record": (1, MUCH / 2), "replay": (1, MUCH / 2)})
    assert "1,000 PFLOP" in advice and "prompts.heldout.count" in advice
    assert (VIDEO in advice) == videos
    assert told(work, {}) == []
