import dataclasses

import pytest
import torch
from tiny_line import run, run_stage, stage
from torch import Tensor

from dirotq.errors import ConfigError
from dirotq.quantize.plan import read_plan
from dirotq.quantize.tensors import load_site, site_file
from dirotq.stages.low_rank import FitLowRank

pytestmark = pytest.mark.usefixtures("looks_every_time")


@pytest.fixture(scope="module")
def fit(line):
    """The configured stage of a method, with few candidates."""

    def configured(method: str, **changes) -> FitLowRank:
        return dataclasses.replace(stage(line(*f"method={method}".split()), "basis"), **changes)

    return configured


@pytest.fixture
def found(finished, tmp_path):
    """What a stage writes for the first site of the plan, and its metrics."""

    def fitted(stage: FitLowRank) -> tuple[dict[str, Tensor], dict[str, float]]:
        metrics = run_stage(stage, tmp_path, capture=finished["capture"])
        entry = next(e for e in read_plan(finished["rank"].file("plan.json")) if e.spec.rank)
        return load_site(tmp_path / "sites" / site_file(entry.site.name)), metrics

    return fitted


def test_svdquant_has_a_branch_and_searched_factors(fit, found):
    few = fit("svdquant method.leading=16", candidates=4)
    tensors, metrics = found(few)
    assert set(tensors) == {"vectors", "duals", "variances", "energy", "smooth", "alpha"}
    assert tensors["vectors"].shape == tensors["duals"].shape
    assert tensors["vectors"].shape[1] == len(tensors["variances"]) == 16
    assert torch.equal(tensors["smooth"], tensors["smooth"].bfloat16().float())
    assert float(tensors["alpha"]) in (-1, 0.25, 0.5, 0.75, 1)
    assert -1 <= metrics["mean_alpha"] <= 1


def test_absorb_has_a_branch_and_no_factors(fit, found):
    tensors, metrics = found(fit("absorb"))
    assert set(tensors) == {"vectors", "duals", "variances", "energy"}
    assert "mean_alpha" not in metrics


def test_smoothquant_has_factors_and_no_branch(fit, found):
    tensors, metrics = found(fit("smoothquant"))
    assert set(tensors) == {"smooth", "alpha", "variances", "energy"}
    assert metrics["mean_alpha"] == 0.5


def test_an_interrupted_run_goes_on_at_the_next_site(fit, finished, tmp_path, monkeypatch):
    stage = fit("absorb")
    run_stage(stage, tmp_path, capture=finished["capture"])
    files = sorted((tmp_path / "sites").iterdir())
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    run_stage(stage, tmp_path, capture=finished["capture"])
    assert files[0].stat().st_mtime_ns == kept
    assert files[1].exists()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("svdquant", {"rank": None}, r"rank.r is null.*rank.r=16"),
        ("svdquant", {"smoothing": "none"}, r"transform.smooth=True and basis.smoothing=none"),
        ("absorb", {"smoothing": "fixed"}, r"branch=weighted takes basis.smoothing=none"),
        ("absorb", {"branch": "none"}, r"branch=beside and basis.branch=none.*svd or weighted"),
        ("absorb", {"branch": "pca"}, r"basis.branch='pca': use 'none', 'svd' or 'weighted'"),
        ("smoothquant", {"smoothing": "all"}, r"use 'none', 'fixed' or 'grid'"),
        ("smoothquant", {"alpha": 1.5}, r"basis.alpha=1.5.*0 \.\.\. 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(fit, method, changes, message):
    with pytest.raises(ConfigError, match=message):
        fit(method, **changes)


@pytest.mark.parametrize("field", ["branch=beside", "transform.smooth=true"])
def test_the_usual_basis_refuses_methods_that_need_another(line, field):
    with pytest.raises(ConfigError, match="use basis=svd, weighted or smooth"):
        line(field)
    with pytest.raises(ConfigError, match="no other method has a use for one"):
        line("basis=weighted")


def test_eight_bit_branches_beside_the_input_are_exact_too(line):
    made = run(line("method=absorb", "branch.bits=8", "until=fuse"))
    assert made["fuse"].metrics["layer_error"] < 1e-5
