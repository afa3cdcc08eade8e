import dataclasses
import json
import math

import pytest
import torch
from hydra.utils import instantiate
from tiny_line import method, overrides, run, run_stage, with_spectra

from dirotq.errors import ConfigError
from dirotq.packed.swap import effective_bits
from dirotq.pipeline.config import compose_config
from dirotq.quantize.measure import site_errors
from dirotq.quantize.plan import read_plan
from dirotq.quantize.planning import read_spectrum
from dirotq.stages import rank_budget
from dirotq.stages.rank_budget import AllocateRank


@pytest.fixture(scope="module")
def captured(line):
    return run(line("until=basis"))


@pytest.fixture(scope="module")
def budget(tiny_root) -> AllocateRank:
    """``rank=budget`` at the bits of r = 16, without an A/B check unless a test says."""
    cfg = compose_config(overrides(tiny_root, tiny_root / "store", "rank=budget"), "dirotq.conf")
    return dataclasses.replace(instantiate(cfg.rank, _convert_="all"), like=16, gate=0)


@pytest.fixture(autouse=True)
def alike(monkeypatch):
    """Relative errors of all sites count alike unless a test says otherwise."""

    def share(line, basis):
        spectrum = read_spectrum(basis, line.site)
        return spectrum.tail(line.spec.rank) / spectrum.energy

    measuring(monkeypatch, share)


def measuring(monkeypatch, error):
    """Let ``error(line, basis)`` be what a site disturbs; return the plans of each pass."""
    passes = []

    def errors(model, plans, basis, *_):
        passes.append(plans)
        return [{line.site.name: error(line, basis) for line in plan} for plan in plans]

    monkeypatch.setattr(rank_budget, "site_errors", errors)
    return passes


def planned(stage, captured, out):
    """The stage's plan, {site: line}, and its metrics."""
    metrics = run_stage(stage, out, capture=captured["capture"], basis=captured["basis"])
    return {line.site.name: line for line in read_plan(out / "plan.json")}, metrics


def block_ranks(plan):
    return {n: line.spec.rank for n, line in plan.items() if line.site.kind == "block"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"like": None}, r"rank\.bits=None, rank\.like=None, rank\.overhead=None: set exactly one"),
        ({"bits": 6.0}, r"rank\.bits=6\.0, rank\.like=16.*: set exactly one"),
        ({"like": 12}, r"rank\.like=12 is not on the grid: use a multiple of 8"),
        ({"gate": -1}, r"rank\.gate=-1, rank\.batch=4"),
        ({"batch": 0}, r"rank\.batch=0: use at least 0 and 1"),
        ({"sensitive": {"count": 0, "keep": 16}}, r"rank\.sensitive\.count=0"),
        ({"method": method("rtn")}, "rank=budget needs a projecting basis.*method rtn has"),
        ({"method": method("dirotq_dense")}, "dirotq_dense has transform=dense"),
    ],
)
def test_settings_that_say_nothing_or_too_much(budget, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(budget, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"like": 192}, r"rank\.like=192 exceeds method\.leading=128.*set method\.leading=192"),
        ({"like": None, "bits": 2.0}, r"rank\.bits=2 is out of reach: without any .*takes \d\.\d+"),
        ({"like": None, "bits": 30.0}, r"rank\.bits=30 is out of reach: .*leading keeps 2\d\."),
        ({"like": None, "overhead": 9.0}, r"rank\.overhead=9 is out of reach: .*takes 0, with"),
        ({"gate": 7}, r"rank\.gate=7 asks for more prompts than calibrate \(6\)"),
        (
            {"method": method("dirotq", overrides=[{"sites": "*.attn.qkw", "keep": 16}])},
            r"matches none of the model's",
        ),
        (
            {"method": method("dirotq", overrides=[{"sites": "*", "rank": 8}])},
            "fix every site; nothing is left to choose",
        ),
    ],
)
def test_check_refuses_before_anything_runs(budget, changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(budget, **changes).check()


def test_check_passes_what_can_be_met(budget):
    budget.check()
    bits = dataclasses.replace(budget, like=None, bits=9.0)
    bits.check()
    dataclasses.replace(budget, like=None, overhead=0.2, gate=6).check()


@pytest.mark.parametrize("bits", [7.5, 8.0, 8.7])
def test_a_plan_keeps_within_its_bits_and_leaves_less_than_a_step(budget, captured, tmp_path, bits):
    stage = dataclasses.replace(budget, like=None, bits=bits)
    plan, metrics = planned(stage, captured, tmp_path)
    skeleton = stage.model.skeleton()
    parameters = sum(p.numel() for p in skeleton.parameters())
    found = effective_bits(skeleton, [(line.site, line.spec) for line in plan.values()])
    assert found == metrics["bits_per_parameter"] <= bits
    dearest = max(8 * 16 * (line.spec.in_features + line.spec.outputs) for line in plan.values())
    assert bits - found < dearest / parameters
    assert metrics["budget_spent"] == pytest.approx(found / bits)
    assert all(line.spec.rank % 8 == 0 for line in plan.values())


def test_more_bits_protect_more_energy(budget, captured, tmp_path):
    def left(bits):
        stage = dataclasses.replace(budget, like=None, bits=bits)
        planned(stage, captured, tmp_path / str(bits))
        rows = json.loads((tmp_path / str(bits) / "allocation.json").read_text())
        return sum(row["predicted_error"] for row in rows)

    found = [left(bits) for bits in (7.3, 7.8, 8.3, 9.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]


def test_like_takes_the_bits_of_the_uniform_rank(budget, captured, line, tmp_path):
    plan, metrics = planned(budget, captured, tmp_path)
    uniform = run(line("until=rank"))["rank"].metrics
    assert metrics["bits_per_parameter"] <= uniform["bits_per_parameter"]
    assert metrics["uniform_rank"] == 16
    # So few sites and so dear steps leave a remainder that costs more than the rest gains.
    assert metrics["predicted_gain_db"] < 0
    assert metrics["fell_back"] == 1
    assert set(block_ranks(plan).values()) == {16}
    assert "no gain is predicted" in plan["transformer_blocks.0.attn.qkv"].why


def test_without_a_gate_a_predicted_gain_is_believed(budget, captured, tmp_path):
    plan, metrics = planned(dataclasses.replace(budget, like=24), captured, tmp_path)
    assert metrics["predicted_gain_db"] > 0
    assert metrics["fell_back"] == 0
    assert "gate_gain_db" not in metrics
    assert len(set(block_ranks(plan).values())) > 1


def test_directions_go_to_the_site_that_has_energy_in_them(budget, captured, store_root, tmp_path):
    sites = [s for s in budget.model.sites() if s.kind == "block"]
    flat = [1.0] * 64
    steep = [1e-3] * 40 + [100.0] * 24
    spectra = {s.name: flat for s in sites} | {sites[1].name: steep}
    basis = with_spectra(store_root, spectra)
    plan, _ = planned(budget, captured | {"basis": basis}, tmp_path)
    assert plan[sites[1].name].spec.rank == 24


def test_an_overhead_is_kept(budget, captured, tmp_path):
    stage = dataclasses.replace(budget, like=None, overhead=0.2)
    plan, metrics = planned(stage, captured, tmp_path)
    assert 0.9 < metrics["budget_spent"] <= 1
    twice, _ = planned(dataclasses.replace(stage, overhead=0.4), captured, tmp_path / "twice")
    assert sum(block_ranks(twice).values()) > sum(block_ranks(plan).values()) > 0


def test_overrides_are_paid_from_the_budget(budget, captured, tmp_path):
    name = "single_transformer_blocks.0.proj_out"
    fixed = method("dirotq", overrides=[{"sites": name, "rank": 32}])
    stage = dataclasses.replace(budget, like=None, bits=8.5, method=fixed)
    plan, metrics = planned(stage, captured, tmp_path)
    assert plan[name].spec.rank == 32
    assert plan[name].why == f"override {name}: rank 32"
    assert metrics["bits_per_parameter"] <= 8.5


def test_the_worst_sites_are_measured_and_stay_out(budget, captured, tmp_path, monkeypatch):
    worst = "transformer_blocks.0.ff.net.2"

    measuring(monkeypatch, lambda line, _: 9.0 if line.site.name == worst else 1.0)
    stage = dataclasses.replace(budget, sensitive={"count": 1, "keep": 16})
    plan, metrics = planned(stage, captured, tmp_path / "kept")
    assert worst not in plan
    assert metrics["sites_kept"] == 1
    kept = json.loads((tmp_path / "kept" / "kept.json").read_text())
    assert "number 1 in measured error" in kept[worst]
    stage = dataclasses.replace(budget, sensitive={"count": 1, "act_bits": 8})
    plan, _ = planned(stage, captured, tmp_path / "finer")
    assert (plan[worst].spec.activations.bits, plan[worst].spec.activations.name) == (8, "token")
    assert "number 1 in measured error" in plan[worst].why


def allocated(out):
    """Rows of ``allocation.json``, {site: row}."""
    return {row["site"]: row for row in json.loads((out / "allocation.json").read_text())}


def test_finer_activations_leave_ranks_and_were_measured(budget, captured, tmp_path, monkeypatch):
    worst = "transformer_blocks.0.ff.net.2"

    def error(line, _):
        return (9.0 if line.site.name == worst else 1.0) / line.spec.activations.bits

    made = measuring(monkeypatch, error)
    monkeypatch.setattr("dirotq.quantize.sensitive.MOST_WORK", 0.5)
    plan, _ = planned(dataclasses.replace(budget, sensitive="auto"), captured, tmp_path)
    assert plan[worst].spec.activations.bits == 8
    assert [len(plans) for plans in made] == [2]
    assert allocated(tmp_path)[worst]["error_alone"] == 9 / 8


def test_errors_are_those_at_the_ranks_that_kept_sites_leave(
    budget, captured, tmp_path, monkeypatch
):
    made = measuring(monkeypatch, lambda line, _: 1.0 + line.spec.rank)
    asked = {"count": 1, "keep": 16}
    stage = dataclasses.replace(budget, like=None, bits=8.5, sensitive=asked)
    planned(stage, captured, tmp_path)
    rows = allocated(tmp_path).values()
    assert [row["error_alone"] for row in rows] == [1.0 + row["uniform_rank"] for row in rows]
    [[first], [again]] = made
    assert {e.spec.rank for e in again} != {e.spec.rank for e in first}
    assert len(again) == len(first) - 1 == len(rows)


def test_measured_sensitivities_move_directions(budget, captured, tmp_path, monkeypatch):
    favoured = "transformer_blocks.0.ff.net.2"

    measuring(monkeypatch, lambda line, _: 1.0 if line.site.name == favoured else 1e-4)
    plan, _ = planned(budget, captured, tmp_path)
    ranks = block_ranks(plan)
    assert ranks[favoured] == max(ranks.values()) > 16


def perverse(stage, captured, monkeypatch, wasted):
    """The stage with all directions at the sites ``wasted``, judged by real images."""

    measuring(monkeypatch, lambda line, _: float(line.site.name in wasted))
    return dataclasses.replace(stage, gate=4)


def test_a_plan_with_worse_images_falls_back_to_uniform(budget, captured, tmp_path, monkeypatch):
    stage = perverse(budget, captured, monkeypatch, {"transformer_blocks.0.attn.to_add_out"})
    plan, metrics = planned(stage, captured, tmp_path)
    assert metrics["fell_back"] == 1
    assert metrics["gate_gain_db"] < 0
    assert metrics["gate_gain_low"] <= metrics["gate_gain_db"] <= metrics["gate_gain_high"]
    assert set(block_ranks(plan).values()) == {16}
    for line in plan.values():
        said = "fell back: the budget plan was not better" in line.why
        assert said == (line.site.kind == "block")


def test_a_plan_with_better_images_stays(budget, captured, tmp_path, monkeypatch):
    calls = []

    def psnr(model, plans, *_, **__):
        calls.append([block_ranks({e.site.name: e for e in plan}) for plan in plans])
        return [torch.tensor([41.0, 43.0]), torch.tensor([40.0, 41.0])]

    monkeypatch.setattr(rank_budget, "plans_psnr", psnr)
    stage = dataclasses.replace(budget, like=24, gate=2)
    plan, metrics = planned(stage, captured, tmp_path)
    assert metrics["fell_back"] == 0
    assert metrics["gate_gain_db"] == pytest.approx(1.5)
    assert (metrics["gate_gain_low"], metrics["gate_gain_high"]) == (1.0, 2.0)
    [[ours, uniform]] = calls
    assert ours == block_ranks(plan)
    assert set(uniform.values()) == {24}
    first = next(line for line in plan.values() if line.site.kind == "block")
    assert "better than uniform: +1.50 dB [+1.00, +2.00] on 2 calibration prompts" in first.why


@pytest.mark.parametrize(
    ("differences", "stays"),
    [((4.0, -1.0), True), ((1.0, -4.0), False), ((2.0, -2.0), False), ((0.5, 0.5), True)],
)
def test_the_check_decides_by_the_mean_and_by_no_end_of_its_interval(
    budget, captured, tmp_path, monkeypatch, differences, stays
):
    theirs = torch.tensor([40.0, 41.0])
    ours = theirs + torch.tensor(differences)
    monkeypatch.setattr(rank_budget, "plans_psnr", lambda *_, **__: [ours, theirs])
    stage = dataclasses.replace(budget, like=24, gate=2)
    _, metrics = planned(stage, captured, tmp_path)
    assert metrics["fell_back"] == (not stays)
    assert metrics["gate_gain_low"] == min(differences)
    assert metrics["gate_gain_high"] == max(differences)


def test_the_line_runs_on_a_budget(line, monkeypatch):
    monkeypatch.setattr(rank_budget, "site_errors", site_errors)
    built = line("rank=budget", "rank.like=24", "rank.gate=2", "until=pack")
    artifacts = run(built)
    assert all(
        math.isfinite(value)
        for artifact in artifacts.values()
        for value in artifact.metrics.values()
    )
    ranks, packed = artifacts["rank"].metrics, artifacts["pack"].metrics
    assert ranks["bits_per_parameter"] == packed["bits_per_parameter"]


def test_estimates_take_the_uniform_rank_of_the_budget(budget):
    sites = budget.model.sites()
    assert set(budget.expected(sites).values()) == {16}
    bits = dataclasses.replace(budget, like=None, bits=8.5)
    found = set(bits.expected(sites).values())
    assert len(found) == 1
    assert 0 <= found.pop() <= 64
