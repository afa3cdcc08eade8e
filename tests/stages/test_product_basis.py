import pytest
import torch
import zarr
from tiny_line import run, run_stage, stage

from dirotq.errors import ConfigError
from dirotq.quantize.moments import moment, read_stored
from dirotq.quantize.plan import read_plan
from dirotq.quantize.tensors import load_site, site_file

pytestmark = pytest.mark.usefixtures("looks_every_time")


def left(s_DD: torch.Tensor, w_ND: torch.Tensor, p_DR: torch.Tensor) -> float:
    """Energy of inputs times energy of weights without these directions."""
    rest = torch.eye(len(s_DD), dtype=torch.float64) - p_DR.double() @ p_DR.double().mT
    return float((rest @ s_DD.double() @ rest).trace() * (w_ND.double() @ rest).square().sum())


def test_every_site_leaves_less_than_the_leading_directions_do(finished, line, tmp_path):
    fit = stage(line("basis=product"), "basis")
    metrics = run_stage(fit, tmp_path, capture=finished["capture"])
    moments = zarr.open_group(finished["capture"].tree("moments.zarr"), mode="r")
    entries = [e for e in read_plan(finished["rank"].file("plan.json")) if e.spec.rank]
    assert metrics == {"sites": len(entries)}
    for entry in entries:
        file = site_file(entry.site.name)
        ours = load_site(tmp_path / "sites" / file)
        theirs = load_site(finished["basis"].file(f"sites/{file}"))
        assert {k: (v.dtype, v.shape) for k, v in ours.items()} == {
            k: (v.dtype, v.shape) for k, v in theirs.items()
        }
        assert torch.equal(ours["energy"], theirs["energy"])
        s = moment(read_stored(moments, entry.site.name), "cpu")
        w, _ = fit.model.weights().stacked(entry.site)
        few, many = (left(s, w, found["vectors"][:, -8:]) for found in (ours, theirs))
        assert few < many


def test_the_line_runs_through(line):
    """``fuse`` proves that these directions are exact too, ``pack`` writes a folder of them."""
    made = run(line("basis=product", "until=pack"))
    assert made["fuse"].metrics["network_error"] < 1e-4


@pytest.mark.parametrize("words", ["method=absorb basis=product", "method=rtn basis=product"])
def test_methods_that_project_nothing_are_refused(line, words):
    with pytest.raises(ConfigError, match="basis=product finds directions to project"):
        stage(line(*words.split()), "basis")


def test_an_odd_number_of_directions(line):
    with pytest.raises(ConfigError, match="basis.leading=0"):
        stage(line("basis=product", "basis.leading=0"), "basis")
