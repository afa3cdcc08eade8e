"""A site that several plans round: the same tensors as each by itself, rounded no oftener."""

import pytest
import torch
from tiny_line import method, run

from dirotq.quantize import nearest
from dirotq.quantize.nearest import pack_each, pack_nearest
from dirotq.quantize.planning import make_plan
from dirotq.sources.model import DiffusersModel

CPU = torch.device("cpu")
SITE = "transformer_blocks.0.ff.net.2"
EIGHT = {"sites": "*", "act_bits": 8}
HIGHER = {"sites": "*", "rank": 24}


@pytest.fixture(scope="module")
def captured(line):
    return run(line("method=dirotq_dense", "until=basis"))


@pytest.mark.parametrize(
    ("name", "overrides", "rounded"),
    [
        ("dirotq", [[], [EIGHT]], 1),
        ("dirotq", [[], [HIGHER]], 2),
        ("dirotq", [[], [EIGHT], [HIGHER], [HIGHER, EIGHT]], 2),
        # A dense rotation leaves 128 - 24 channels: groups of activations fill up the last one.
        ("dirotq_dense", [[HIGHER], [HIGHER, EIGHT]], 2),
    ],
)
def test_plans_that_differ_in_activations_alone_round_once(
    folder, captured, monkeypatch, name, overrides, rounded
):
    model = DiffusersModel(path=str(folder), call={})
    entries = []
    for each in overrides:
        plan = make_plan(method(name, overrides=each), model.sites(), lambda site: (16, "a test"))
        entries += plan.among([SITE])
    given = captured["basis"], model.weights(), CPU
    alone = [pack_nearest(entry, *given) for entry in entries]
    calls, stored = [], nearest._stored
    monkeypatch.setattr(nearest, "_stored", lambda *a: calls.append(a) or stored(*a))
    together = pack_each(entries, *given)
    assert len(calls) == rounded
    for got, want, entry in zip(together, alone, entries, strict=True):
        assert got.spec == entry.spec
        tensors = got.state_dict()
        assert tensors.keys() == want.state_dict().keys()
        assert all(torch.equal(tensors[n], t) for n, t in want.state_dict().items())
