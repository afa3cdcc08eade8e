import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_line import METHODS, method, run, run_stage, stage, with_spectra

from dirotq.errors import ArtifactError, ConfigError
from dirotq.loading import load
from dirotq.models.flux import FLUX
from dirotq.packed.swap import effective_bits
from dirotq.quantize.plan import SitePlan, read_plan
from dirotq.stages.rank import ChooseRank


@pytest.fixture(scope="session")
def rank(line) -> ChooseRank:
    return stage(line(), "rank")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 12}, r"rank\.r=12 is not on the grid: use a multiple of 8, such as (8|16)$"),
        ({"r": 3}, r"rank\.r=3 .* such as 8$"),
        ({"r": -8}, r"rank\.r=-8 is not on the grid"),
        ({"energy": 0.5}, r"rank\.r=16, rank\.fraction=None, rank\.energy=0\.5: set exactly one"),
        ({"r": None}, r"rank\.r=None, rank\.fraction=None, rank\.energy=None: set exactly one"),
        ({"r": None, "fraction": 1.0}, r"rank\.fraction=1\.0 is no share: use 0 <= fraction < 1"),
        ({"r": None, "fraction": -0.5}, r"rank\.fraction=-0\.5 is no share"),
        ({"sensitive": {"count": 1}}, r"rank\.sensitive=\{'count': 1\} says no finer precision"),
        ({"r": None, "energy": 1.0}, r"rank\.energy=1\.0 is no share"),
        ({"r": None, "energy": -0.1}, r"rank\.energy=-0\.1 is no share"),
    ],
)
def test_settings_that_say_nothing_or_too_much(rank, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(rank, **changes)


def test_check_refuses_a_rank_above_the_channels_and_names_the_site(rank):
    dataclasses.replace(rank, r=64).check()
    with pytest.raises(
        ConfigError, match=r"site transformer_blocks\.0\..*rank 72 is not in 0 \.\.\. 64"
    ):
        dataclasses.replace(rank, r=72).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            "act_format.group=48",
            r"activation group 48 does not divide the 64 .*use one of \[16, 32, 64",
        ),
        ("weight_format=int4_group weight_format.group=7", "weight group 7 does not divide"),
    ],
)
def test_check_refuses_a_method_that_does_not_fit_and_names_the_site(rank, changes, message):
    wrong = dataclasses.replace(rank, method=method("dirotq", *changes.split()))
    with pytest.raises(ConfigError, match=rf"site transformer_blocks\.0.*{message}"):
        wrong.check()


def test_check_names_a_modulator_whose_group_does_not_divide(rank):
    wrong = dataclasses.replace(rank, method=dataclasses.replace(rank.method, modulator_group=48))
    with pytest.raises(ConfigError, match=r"site transformer_blocks\.0\.norm1\.linear.*group 48"):
        wrong.check()


@pytest.mark.parametrize("name", METHODS)
def test_the_plan_lists_every_site_in_order(finished, line, name):
    built = line(f"method={name}", "until=rank")
    plan = read_plan(run(built)["rank"].file("plan.json"))
    used = method(name)
    assert [entry.site for entry in plan] == stage(built, "rank").model.sites()
    for entry in plan:
        modulator = entry.site.kind == "modulator"
        assert entry.spec.rank == (0 if modulator or used.branch is None else 16)
        assert entry.spec.activations.bits == (16 if modulator else used.activations.bits)
        assert entry.spec.out_features == entry.site.out_features
        assert (entry.rounding, entry.clip) == (used.rounding, used.weight_clip)
        assert entry.why
    assert "16 of 64 directions hold" in plan[2].why or used.branch is None


def test_modulators_that_stay_in_16_bits_are_not_in_the_plan(finished, rank, tmp_path):
    rank = dataclasses.replace(rank, method=dataclasses.replace(rank.method, modulator_group=None))
    run_stage(rank, tmp_path, capture=finished["capture"], basis=finished["basis"])
    plan = read_plan(tmp_path / "plan.json")
    assert {entry.site.kind for entry in plan} == {"block"}


@pytest.mark.parametrize(
    ("energy", "ranks"),
    [
        (0.0, {64: 8}),
        (0.5, {64: 8}),
        (0.51, {64: 16}),  # the ninth direction is needed
        (0.8, {64: 48}),
        (0.9999, {64: 64}),
    ],
)
def test_energy_takes_the_smallest_rank_on_the_grid_that_holds_it(
    rank, finished, store_root, tmp_path, energy, ranks
):
    # Eight directions hold one half; the other 56 share the rest evenly.
    narrow = [s for s in rank.model.sites() if s.kind == "block"]
    spectrum = [0.5 / 56] * 56 + [0.5 / 8] * 8
    basis = with_spectra(store_root, {s.name: spectrum for s in narrow})
    chosen = dataclasses.replace(rank, r=None, energy=energy)
    run_stage(chosen, tmp_path, capture=finished["capture"], basis=basis)
    plan = {e.site.name: e for e in read_plan(tmp_path / "plan.json")}
    got = {s.in_features: plan[s.name].spec.rank for s in narrow if s.in_features == 64}
    assert got == ranks
    assert "energy: " in plan[narrow[0].name].why


@pytest.mark.parametrize(
    ("fraction", "ranks"),
    [
        (0.0, {64: 0, 256: 0, 320: 0}),
        (0.125, {64: 8, 256: 32, 320: 40}),
        (0.07, {64: 8, 256: 16, 320: 24}),  # 4.5, 17.9 and 22.4
    ],
)
def test_a_fraction_takes_the_nearest_multiple_of_the_grid(
    rank, finished, tmp_path, fraction, ranks
):
    chosen = dataclasses.replace(rank, r=None, fraction=fraction)
    chosen.check()
    run_stage(chosen, tmp_path, capture=finished["capture"], basis=finished["basis"])
    plan = [e for e in read_plan(tmp_path / "plan.json") if e.site.kind == "block"]
    assert {entry.spec.in_features: entry.spec.rank for entry in plan} == ranks
    assert plan[0].why.startswith(f"fraction: {ranks[64]} of 64 directions hold")


def test_check_refuses_a_fraction_above_what_basis_keeps(rank):
    chosen = dataclasses.replace(rank, r=None, fraction=0.6)
    with pytest.raises(
        ConfigError, match=r"rank\.fraction=0\.6 asks for 192 .*set method\.leading=192"
    ):
        chosen.check()


FF = "transformer_blocks.0.ff.net.2"


def overridden(rank, *overrides):
    changed = dataclasses.replace(rank.method, overrides=list(overrides))
    return dataclasses.replace(rank, method=changed)


def test_overrides_reach_the_plan_with_their_reason(rank, finished, tmp_path):
    chosen = overridden(
        rank,
        {"sites": "*.attn.to_add_out", "keep": 16},
        {"sites": FF, "act_bits": 8, "why": "noisy"},
        {"sites": "single_transformer_blocks.*", "rank": 32},
    )
    chosen.check()
    metrics = run_stage(chosen, tmp_path, capture=finished["capture"], basis=finished["basis"])
    plan = {e.site.name: e for e in read_plan(tmp_path / "plan.json")}
    assert "transformer_blocks.0.attn.to_add_out" not in plan
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert kept == {"transformer_blocks.0.attn.to_add_out": "override *.attn.to_add_out: 16 bits"}
    assert metrics["sites_kept"] == 1
    acts = plan[FF].spec.activations
    assert (acts.element, acts.granularity, plan[FF].spec.rank) == ("int8", "token", 16)
    assert plan[FF].why.startswith("fixed: 16 of 256 directions hold")
    assert plan[FF].why.endswith("noisy: 8-bit activations")
    assert plan["single_transformer_blocks.0.proj_out"].spec.rank == 32
    assert plan["single_transformer_blocks.0.norm.linear"].spec.rank == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"sites": FF[:-1] + "3", "keep": 16}, rf"matches none.*the closest are {FF}"),
        ({"sites": FF, "rank": 12}, "is not on the grid"),
        ({"sites": FF, "rank": 192}, r"rank=192 exceeds method\.leading=128"),
        ({"sites": "*.attn.qkv", "rank": 72}, r"transformer_blocks\.0\.attn\.qkv.*rank 72"),
        ({"sites": "*", "keep": 16}, "nothing is left to quantize"),
    ],
)
def test_check_refuses_overrides_that_do_not_fit(rank, override, message):
    with pytest.raises(ConfigError, match=message):
        overridden(rank, override).check()


def test_a_packed_model_keeps_and_refines_what_overrides_say(line):
    overrides = '[{sites: "*.attn.to_add_out", keep: 16}, {sites: "*.ff.net.2", act_bits: 8}]'
    artifacts = run(line(f"method.overrides={overrides}", "until=pack"))
    transformer = load(artifacts["pack"].path, device="cpu").transformer
    assert transformer.get_submodule(FF).spec.activations.bits == 8
    kept = transformer.get_submodule("transformer_blocks.0.attn.to_add_out")
    assert type(kept) is torch.nn.Linear
    bits = {name: artifacts[name].metrics["bits_per_parameter"] for name in ("rank", "pack")}
    assert bits["rank"] == bits["pack"]


@pytest.mark.parametrize("file", ["probe.safetensors", "probe.json"])
def test_no_probe_is_read_past_its_digest(rank, finished, tmp_path, file):
    capture = copied(finished["capture"], tmp_path)
    content = bytearray((capture.data / file).read_bytes())
    content[-20] ^= 1
    (capture.data / file).write_bytes(content)
    chosen = dataclasses.replace(rank, sensitive={"count": 1, "act_bits": 8})
    with pytest.raises(ArtifactError, match=rf"{re.escape(file)} changed after it was written"):
        run_stage(chosen, tmp_path / "out", capture=capture, basis=finished["basis"])


def copied(artifact, tmp_path):
    path = tmp_path / "store" / artifact.stage / artifact.fingerprint
    return dataclasses.replace(artifact, path=Path(shutil.copytree(artifact.path, path)))


def test_the_worst_site_takes_finer_activations(rank, finished, tmp_path):
    chosen = dataclasses.replace(rank, sensitive={"count": 1, "act_bits": 8})
    run_stage(chosen, tmp_path, capture=finished["capture"], basis=finished["basis"])
    finer = [e for e in read_plan(tmp_path / "plan.json") if e.spec.activations.bits == 8]
    assert len(finer) == 1
    assert "; number 1 in measured error (" in finer[0].why


def test_sites_that_gain_enough_take_finer_activations(rank, finished, tmp_path, monkeypatch):
    """Errors of both precisions come from one pass."""
    asked = []

    def errors(model, plans, *_):
        asked.append([{e.site.name: e.spec.activations.bits for e in plan} for plan in plans])
        return [
            {
                line.site.name: (100.0 if line.site.name == FF else 1.0)
                / (10 if line.spec.activations.bits == 8 else 1)
                for line in plan
            }
            for plan in plans
        ]

    monkeypatch.setattr("dirotq.stages.rank.site_errors", errors)
    monkeypatch.setattr("dirotq.quantize.sensitive.LEAST_GAIN", 1.0)
    monkeypatch.setattr("dirotq.quantize.sensitive.MOST_WORK", 0.5)
    chosen = dataclasses.replace(rank, sensitive="auto")
    chosen.check()
    metrics = run_stage(chosen, tmp_path, capture=finished["capture"], basis=finished["basis"])
    finer = [e for e in read_plan(tmp_path / "plan.json") if e.spec.activations.bits == 8]
    assert [entry.site.name for entry in finer] == [FF]
    assert "% of the arithmetic: 8-bit activations" in finer[0].why
    assert metrics["sites_finer"] == 1
    blocks = [e for e in read_plan(tmp_path / "plan.json") if e.site.kind == "block"]
    assert asked == [[{e.site.name: bits for e in blocks} for bits in (4, 8)]]


def test_auto_measures_nothing_where_eight_bits_are_no_finer(rank, finished, tmp_path, monkeypatch):
    monkeypatch.setattr("dirotq.stages.rank.site_errors", None)
    chosen = dataclasses.replace(rank, sensitive="auto", method=method("dirotq_w4a8"))
    run_stage(chosen, tmp_path, capture=finished["capture"], basis=finished["basis"])


def test_metrics(finished):
    metrics = finished["rank"].metrics
    assert metrics["mean_rank"] == 16
    packed = finished["pack"].metrics["bits_per_parameter"]
    assert (
        metrics["bits_per_parameter"]
        == packed
        == finished["validate"].metrics["bits_per_parameter"]
    )


def test_the_plan_is_readable_json(finished):
    first = json.loads(finished["rank"].file("plan.json").read_text())[0]
    assert {"site", "spec", "rounding", "clip", "why"} == first.keys()


def test_effective_bits_of_flux_1_dev():
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True)
    assert sum(p.numel() for p in flux.parameters()) == pytest.approx(11.9e9, rel=0.01)
    used = method("dirotq")
    plan = []
    for site in FLUX.sites(flux):
        spec = used.spec(site, 64 if site.kind == "block" else 0)
        plan.append(SitePlan(site, spec, used.rounding, used.weight_clip, "r = 64"))
    bits = effective_bits(flux, [(entry.site, entry.spec) for entry in plan])
    assert 4.0 < bits <= 4.8
