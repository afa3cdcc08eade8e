import pytest
import torch
from diffusers import FluxTransformer2DModel
from tiny_line import method, run

from dirotq.models.call import load_calls
from dirotq.quantize import measure
from dirotq.quantize.measure import site_errors
from dirotq.quantize.planning import make_plan
from dirotq.sources.model import DiffusersModel

CPU = torch.device("cpu")
SINGLE = "single_transformer_blocks.0"
FF = "transformer_blocks.0.ff.net.2"


@pytest.fixture(scope="module")
def captured(line):
    return run(line("until=basis"))


def measured(folder, captured, change=None, rank=16, calls=1, more=()):
    """Errors of the pipeline in ``folder``, its transformer's weights changed first."""
    if change is not None:
        transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
        with torch.no_grad():
            change(transformer)
        transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    model = DiffusersModel(path=str(folder), call={})
    plan = make_plan(method("dirotq", *more), model.sites(), lambda site: (rank, "a test"))
    probe, *_ = load_calls(captured["capture"].data, ["probe"])
    return site_errors(model, plan.blocks, captured["basis"], [probe] * calls, CPU)


@pytest.fixture(scope="module")
def plain(folder, captured):
    return measured(folder, captured)


def test_every_block_site_has_an_error(plain, folder):
    sites = DiffusersModel(path=str(folder), call={}).sites()
    assert list(plain) == [site.name for site in sites if site.kind == "block"]
    assert all(0 < error < 1 for error in plain.values())


def test_what_the_network_ignores_has_none(own_folder, captured, plain):
    def deafen(transformer):
        transformer.get_submodule(f"{SINGLE}.proj_out").weight.zero_()

    found = measured(own_folder, captured, deafen)
    assert plain[f"{SINGLE}.qkv_mlp"] > 0
    assert found[f"{SINGLE}.qkv_mlp"] == 0
    assert found[FF] > 0


def test_what_the_network_amplifies_has_more(own_folder, captured, plain):
    def amplify(transformer):
        transformer.get_submodule(FF).weight.mul_(4)

    assert measured(own_folder, captured, amplify)[FF] > 4 * plain[FF]


def test_more_protected_directions_and_finer_codes_disturb_less(folder, captured, plain):
    wide = measured(folder, captured, rank=56)
    fine = measured(folder, captured, more=("act_format=int8_token",))
    for better in (wide, fine):
        assert sum(better.values()) < 0.7 * sum(plain.values())


def test_passes_and_repeated_calls_change_nothing(folder, captured, plain, monkeypatch):
    monkeypatch.setattr(measure.Replay, "make_room", lambda *_: 4)
    assert measured(folder, captured, calls=2) == pytest.approx(plain, rel=1e-6)


def test_a_copy_is_computed_from_its_sites_block_on(folder, captured, plain, monkeypatch):
    """Blocks before it would repeat what the call as it is has computed, bit for bit."""
    followed = []
    clone = torch.Tensor.clone

    def count(tensor):
        followed.append(tensor.shape)
        return clone(tensor)

    monkeypatch.setattr(measure.Tensor, "clone", count)
    assert measured(folder, captured) == plain
    assert followed
    monkeypatch.setattr(
        measure._Shared, "begin", lambda self, part: setattr(self, "each", len(part) + 1)
    )
    seen = len(followed)
    assert measured(folder, captured) == plain
    assert len(followed) == seen
