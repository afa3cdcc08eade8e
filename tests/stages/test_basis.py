import re

import pytest
import torch
import zarr
from tiny_line import run_stage, stage, with_moment

from dirotq.errors import ConfigError, NumericalError
from dirotq.quantize import spectrum as module
from dirotq.quantize.moments import moment as unpacked
from dirotq.quantize.moments import read_stored
from dirotq.quantize.spectrum import leading_basis, principal_basis
from dirotq.quantize.tensors import load_site


def moment(rows: int, dim: int = 12) -> torch.Tensor:
    x = torch.randn(rows, dim, dtype=torch.float64)
    return x.T @ x / rows


def test_a_diagonal_moment_is_its_own_basis():
    variances, vectors = principal_basis(torch.diag(torch.tensor([3.0, 1.0, 2.0])))
    assert variances.tolist() == [1.0, 2.0, 3.0]
    assert vectors.abs().tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize("rows", [100, 5])
def test_orthonormal_ascending_and_complete(rows):
    s = moment(rows)
    variances, vectors = principal_basis(s.float())
    assert variances.dtype == vectors.dtype == torch.float64
    assert (variances.diff() >= 0).all()
    assert (variances >= 0).all()  # rounding below zero is cut off
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(12).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close((vectors * variances) @ vectors.T, s, rtol=0, atol=1e-5)


def test_the_last_columns_hold_the_most_energy_of_any_basis():
    x = torch.randn(300, 12, dtype=torch.float64) * torch.logspace(0, -2, 12)
    _, vectors = principal_basis(x.T @ x / 300)
    held = (x @ vectors[:, -4:]).square().sum()
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64)).Q
        assert (x @ other).square().sum() <= held


def test_a_dead_site():
    with pytest.raises(NumericalError, match="all activations are zero"):
        principal_basis(torch.zeros(4, 4))


def test_rounding_of_a_large_moment_is_no_fault():
    """Of few calls most eigenvalues are zero, and as many roundings as channels move them."""
    variances = torch.tensor([-2e-5, *[0.0] * 298, 1.0])
    assert principal_basis(torch.diag(variances))[0].min() == 0
    with pytest.raises(NumericalError, match="not positive semi-definite"):
        principal_basis(torch.diag(variances[[0, -1]]))


def test_a_moment_that_is_none():
    with pytest.raises(
        NumericalError, match=r"not positive semi-definite: eigenvalues -1 \.\.\. 2"
    ):
        principal_basis(torch.diag(torch.tensor([2.0, -1.0])))


def test_every_block_site_has_an_orthonormal_basis_of_its_moment(finished, line):
    moments = zarr.open_group(finished["capture"].tree("moments.zarr"), mode="r")
    sites = stage(line(), "basis").model.sites()
    files = set(finished["basis"].manifest["files"])
    assert files == {f"sites/{s.name}.safetensors" for s in sites if s.kind == "block"}
    for site in (s for s in sites if s.kind == "block"):
        found = load_site(finished["basis"].file(f"sites/{site.name}.safetensors"))
        vectors, variances = found["vectors"], found["variances"]
        assert (vectors.dtype, variances.dtype) == (torch.float32, torch.float64)
        error = vectors.T @ vectors - torch.eye(vectors.shape[1])
        assert error.abs().max() < 1e-5
        s = unpacked(read_stored(moments, site.name), "cpu")
        assert vectors.shape == (site.in_features, min(site.in_features, 128))
        assert float(found["energy"]) == pytest.approx(float(s.diagonal().double().sum()))
        along = ((s.double() @ vectors.double()) * vectors.double()).sum(0)
        torch.testing.assert_close(along, variances, rtol=1e-5, atol=1e-6 * float(found["energy"]))
    assert finished["basis"].metrics["sites"] == len(files)


def test_fewer_directions_than_ranks_are_chosen_from_are_refused(line):
    for said in ("basis.leading=8", "basis.leading=127", "method=dirotq_dense basis.leading=32"):
        with pytest.raises(ConfigError, match=r"basis\.leading=\d+ keeps fewer .*method\.leading="):
            line(*said.split())
    with pytest.raises(ConfigError, match=r"basis\.leading=8 keeps fewer"):
        line("method=svdquant", "basis.leading=8")
    line("method=rtn", "basis.leading=8")
    line("basis.leading=null")


def left(s_DD: torch.Tensor, w_ND: torch.Tensor, p_DR: torch.Tensor) -> float:
    """Energy of inputs times energy of weights without these directions (Eq. 15)."""
    rest = torch.eye(len(s_DD), dtype=torch.float64) - p_DR.double() @ p_DR.double().mT
    return float((rest @ s_DD.double() @ rest).trace() * (w_ND.double() @ rest).square().sum())


def test_the_default_leaves_less_than_principal_directions_do(finished, line, tmp_path):
    fit = stage(line("basis=principal"), "basis")
    metrics = run_stage(fit, tmp_path, capture=finished["capture"])
    moments = zarr.open_group(finished["capture"].tree("moments.zarr"), mode="r")
    sites = [site for site in fit.model.sites() if site.kind == "block"]
    assert metrics["sites"] == len(sites)
    for site in sites:
        file = f"sites/{site.name}.safetensors"
        ours, theirs = load_site(finished["basis"].file(file)), load_site(tmp_path / file)
        assert torch.equal(ours["energy"], theirs["energy"])
        s = unpacked(read_stored(moments, site.name), "cpu")
        principal = theirs["vectors"].double()
        image = s.double() @ principal
        assert (image - principal * theirs["variances"]).norm() < 1e-5 * s.norm()
        w, _ = fit.model.weights().stacked(site)
        few, many = (left(s, w, found["vectors"][:, -8:]) for found in (ours, theirs))
        assert few < many


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("method=absorb basis=default", "this basis has neither factors nor branches"),
        ("basis.directions=leading", "allowed is 'principal' or 'product'"),
        ("basis.leading=0", "basis.leading=0: use at least 1"),
    ],
)
def test_what_is_refused(line, words, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        stage(line(*words.split()), "basis")


@pytest.mark.parametrize(
    ("factor", "message"), [(0.0, "all activations are zero"), (-1.0, "not positive semi-definite")]
)
def test_a_bad_moment_names_its_site(line, finished, store_root, factor, message):
    site = "transformer_blocks.0.ff.net.2"
    capture = with_moment(finished["capture"], store_root, site, lambda s: s * factor)
    with pytest.raises(NumericalError, match=rf"site {site}: .*{message}"):
        run_stage(stage(line(), "basis"), store_root / "out", capture=capture)


@pytest.mark.parametrize("decay", [0.3, 1.0, 3.0])
def test_the_iteration_holds_the_energy_that_eigh_holds(decay):
    dim = 700
    turn = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64)).Q
    spectrum = torch.arange(1, dim + 1).double() ** -decay
    s = ((turn * spectrum) @ turn.T).float()
    variances, vectors = leading_basis(s, 32)
    exact, _ = principal_basis(s, 32)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(32).double(), rtol=0, atol=1e-10)
    assert (variances.diff() >= 0).all()
    held = (vectors.T @ s.double() @ vectors).diagonal()
    torch.testing.assert_close(held, variances, rtol=1e-4, atol=1e-7)
    assert held.sum() >= (1 - 1e-3) * exact.sum()
    assert held[-8:].sum() >= (1 - 1e-5) * exact[-8:].sum()


def test_the_iteration_meets_a_moment_of_low_rank():
    x = torch.randn(10, 600)
    variances, vectors = leading_basis(x.T @ x / 10, 32)
    exact, _ = principal_basis(x.T @ x / 10, 32)
    torch.testing.assert_close(variances, exact, rtol=1e-4, atol=1e-4 * float(exact[-1]))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(32).double(), rtol=0, atol=1e-8)


def test_wide_sites_take_the_iteration_and_narrow_ones_do_not(monkeypatch):
    taken = []
    monkeypatch.setattr(module, "leading_basis", lambda s, leading: taken.append(len(s)))
    monkeypatch.setattr(module, "DENSE", 100)
    principal_basis(moment(300, 400).float(), 16)
    principal_basis(moment(300, 400).float(), None)
    principal_basis(moment(300, 90).float(), 16)
    assert taken == [400]
