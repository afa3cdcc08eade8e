import torch
from tiny_fixtures import *  # noqa: F403
from tiny_line import stage

from dirotq.kernels.linear import QuantLinear
from dirotq.loading import load_denoisers
from dirotq.quantize.moments import Captured
from dirotq.quantize.packed_network import describe
from dirotq.quantize.plan import read_plan


def test_sites_come_to_the_device_one_by_one_and_go_again(finished, line, monkeypatch):
    denoisers = load_denoisers(finished["pack"].tree("model"), torch.float32)
    plan = read_plan(finished["rank"].file("plan.json"))
    moved, plain = [], QuantLinear.to

    def to(self, device):
        moved.append((self, str(device)))
        return plain(self, device)

    monkeypatch.setattr(QuantLinear, "to", to)
    model, there = stage(line(), "validate").model, torch.device("cpu:0")
    told = describe(model, denoisers, plan, Captured(finished["capture"]), there)
    linears = [denoisers["transformer"].get_submodule(entry.site.name) for entry in plan]
    assert moved == [(one, where) for one in linears for where in ("cpu:0", "cpu")]
    assert all(site["sqnr_db"] > 0 for site in told["sites"])


def test_without_inputs_sites_are_listed_alone(finished, line):
    denoisers = load_denoisers(finished["pack"].tree("model"), torch.float32)
    plan = read_plan(finished["rank"].file("plan.json"))
    model = stage(line(), "validate").model
    told = describe(model, denoisers, plan, None, torch.device("cpu"))
    assert [site["site"] for site in told["sites"]] == [entry.site.name for entry in plan]
    assert {site["sqnr_db"] for site in told["sites"]} == {None}
    assert told["timesteps"] == [] and "denoisers" not in told
