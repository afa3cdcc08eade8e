from contextlib import ExitStack

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import FeedForward
from tiny_line import method, run
from tiny_pipelines import family_folder

from dirotq.errors import NumericalError
from dirotq.kernels.linear import SiteView
from dirotq.models.call import load_calls, load_probe
from dirotq.quantize import measure
from dirotq.quantize.measure import site_errors
from dirotq.quantize.nearest import pack_nearest
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
    [errors] = site_errors(model, [plan.blocks], captured["basis"], [probe] * calls, CPU)
    return errors


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


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_a_pass_of_several_plans_is_a_pass_of_each(line, tiny_root, captured, name):
    """The very same numbers: of activations alone, of another rank, and of some sites."""
    folder, made = tiny_root / "model", captured
    if name != "flux":
        folder = family_folder(tiny_root, name)
        made = run(line(f"model={folder}", "until=basis"))
    model = DiffusersModel(path=str(folder), call={})
    probes = load_probe(made["capture"])

    def plan(rank, *more):
        return make_plan(method("dirotq", *more), model.sites(), lambda site: (rank, "a test"))

    fine = plan(16, "act_format=int8_token").blocks
    plans = [plan(16).blocks, fine, plan(24).blocks, fine[2:5]]
    alone = [site_errors(model, [each], made["basis"], probes, CPU)[0] for each in plans]
    assert site_errors(model, plans, made["basis"], probes, CPU) == alone
    assert [list(each) for each in alone] == [[e.site.name for e in each] for each in plans]
    assert alone[0] != alone[1] != alone[2]


def test_calls_in_several_passes_change_nothing(folder, captured, monkeypatch):
    together = measured(folder, captured, calls=3)
    monkeypatch.setattr(measure.Replay, "make_room", lambda *_: 0)
    assert measured(folder, captured, calls=3) == pytest.approx(together, rel=1e-9)


@pytest.mark.parametrize("full", [False, True])
def test_what_has_no_room_waits_in_host_memory(folder, captured, plain, monkeypatch, full):
    def make_room(replay, call, count):
        replay.park = full
        return count

    parked, keep = [], measure.Adjoint._kept

    def kept(adjoint, tensor):
        parked.append(adjoint.park)
        return keep(adjoint, tensor)

    monkeypatch.setattr(measure.Replay, "make_room", make_room)
    monkeypatch.setattr(measure.Adjoint, "_kept", kept)
    assert measured(folder, captured) == plain
    assert set(parked) == {full}


def test_estimates_are_what_each_site_does_by_itself(folder, captured, monkeypatch):
    """Against one forward for each site, whose output it is off in."""
    monkeypatch.setattr(measure, "DIRECTIONS", 256)
    found = measured(folder, captured)
    network = FluxTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float32)
    model = DiffusersModel(path=str(folder), call={})
    plan = make_plan(method("dirotq"), model.sites(), lambda site: (16, "a test"))
    call = load_calls(captured["capture"].data, ["probe"])[0].on(CPU, torch.float32)

    def output():
        with torch.no_grad():
            return network(*call.args, **call.kwargs, return_dict=False)[0]

    want = output()
    for line in plan.blocks:
        packed = pack_nearest(line, captured["basis"], model.weights(), CPU)
        with ExitStack() as hooks:
            for linear, rows in line.site.slices():
                view = SiteView(packed, rows)
                module = network.get_submodule(linear)
                hook = module.register_forward_hook(lambda _, args, y, view=view: view(args[0]))
                hooks.callback(hook.remove)
            alone = (output() - want).square().mean().item()
        # Estimates spread by 9 % (256 directions), and are of first order.
        assert found[line.site.name] == pytest.approx(alone, rel=0.35), line.site.name


def test_an_error_that_is_not_finite_names_its_site(own_folder, captured):
    def overflow(transformer):
        transformer.get_submodule("proj_out").weight.fill_(3e38)

    with pytest.raises(NumericalError, match=r"site (single_)?transformer_blocks"):
        measured(own_folder, captured, overflow)


def test_what_computes_without_gradients_is_told(folder, captured, plain, monkeypatch, caplog):
    monkeypatch.setattr(FeedForward, "forward", torch.no_grad()(FeedForward.forward))
    found = measured(folder, captured)
    assert found[FF] == 0 < plain[FF]
    assert "4 sites, such as transformer_blocks.0.ff" in caplog.text
    assert "compute without gradients" in caplog.text
