"""Graphs without a GPU: a recorder that replays by calling the function on the same tensors."""

import copy
import gc
import inspect
import logging
import re
import weakref
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor
from toy_graphs import (
    Again,
    Toy,
    fresh,  # noqa: F401
    recorded,
    rows,
    run,
    toy,
)

from dirotq.errors import ConfigError
from dirotq.runtime.graphs import GIVE_UP, GraphedForward, graph_forward, ungraph_forward


def test_seen_recorded_replayed():
    network, plain = toy(), Toy().eval()
    made = []
    for seed in range(4):
        x = rows(3, seed)
        got = run(network, x)
        assert type(got) is Transformer2DModelOutput
        assert torch.equal(got.sample, run(plain, x).sample)
        made.append((Again.captures, Again.replays))
    assert made == [(0, 0), (1, 1), (1, 2), (1, 3)]


def test_the_first_recording_is_reported(caplog):
    network = toy()
    with caplog.at_level(logging.INFO):
        for count in (3, 2):
            recorded(network, rows(count))
            run(network, rows(count))
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"Toy was recorded as one CUDA graph in \d+\.\d s \(3 x 4\)", line)


def test_every_run_gets_containers_of_its_own():
    """Forwards may pop from a dict that they are given."""

    class Pops(Toy):
        def forward(self, hidden_states: Tensor, *, more: dict[str, Tensor]) -> Any:
            return (hidden_states + more.pop("extra"),)

    network = Pops().eval()
    graph_forward(network, recorder=Again)
    for _ in range(3):
        run(network, rows(3), more={"extra": torch.ones(4)})
    assert Again.replays == 2


def test_results_are_the_callers():
    network = toy()
    recorded(network, rows(3), return_dict=False)
    first, none = run(network, rows(3, 1), return_dict=False)
    kept = first.clone()
    run(network, rows(3, 2), return_dict=False)
    assert none is None
    assert torch.equal(first, kept)
    first.zero_()
    assert torch.equal(run(network, rows(3, 1), return_dict=False)[0], kept)


def test_inputs_are_copied():
    network = toy()
    x = rows(3)
    recorded(network, x)
    graph = next(iter(network.forward.calls.values()))
    (mine,) = graph.inputs
    assert mine.data_ptr() != x.data_ptr()
    run(network, rows(3, 1))
    assert torch.equal(mine, rows(3, 1))
    assert torch.equal(x, rows(3))


def test_strides_are_no_part_of_the_key():
    network, plain = toy(), Toy().eval()
    recorded(network, rows(3))
    for x in (rows(6)[::2], rows(4).T[:3], rows(1).expand(3, 4)):
        torch.testing.assert_close(run(network, x).sample, run(plain, x).sample)
    assert Again.captures == 1
    assert next(iter(network.forward.calls.values())).inputs[0].is_contiguous()


def test_keyword_position_and_default_are_one_call():
    network, x, t = toy(), rows(3), torch.tensor(2.0)
    run(network, x, t)
    run(network, hidden_states=x, timestep=t)
    run(network, timestep=t, hidden_states=x, return_dict=True)
    run(network, x, t, joint_attention_kwargs=None)
    assert (Again.captures, Again.replays) == (1, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_states": rows(2)},
        {"hidden_states": rows(3)[None]},
        {"timestep": torch.tensor([2.0])},
        {"timestep": torch.tensor(2.0, dtype=torch.float64)},
        {"timestep": 2.0},
        {"timestep": 2},
        {"timestep": True},
        {"timestep": None},
        {"more": [torch.ones(4)]},
        {"more": (torch.ones(4),)},
        {"more": {}},
        {"return_dict": False},
        {"joint_attention_kwargs": {}},
    ],
    ids=str,
)
def test_what_makes_another_call(change):
    network = toy()
    base = {"hidden_states": rows(3), "timestep": torch.tensor(2.0)}
    recorded(network, **base)
    run(network, **base | change)
    assert (Again.captures, Again.replays) == (1, 1)
    assert len(network.forward.calls) == 2
    run(network, **base | change)
    assert Again.captures == 2


def test_plain_values_and_nested_tensors_reach_the_forward():
    network, plain = toy(), Toy().eval()
    more = [torch.ones(4), (3.0)]
    for seed in range(3):
        more[0] = rows(1, seed)
        call = {"hidden_states": rows(3), "timestep": 0.5, "more": more}
        assert torch.equal(run(network, **call).sample, run(plain, **call).sample)
    assert Again.replays == 2


def test_modes_make_another_call():
    network = toy()
    recorded(network, rows(3))
    network.train()
    run(network, rows(3))
    network.eval()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        run(network, rows(3))
    finally:
        torch.set_float32_matmul_precision(before)
    assert (Again.captures, Again.replays) == (1, 1)
    run(network, rows(3))
    assert Again.replays == 2


def test_the_least_recent_goes():
    network = toy(limit=2)
    for count in (1, 2):
        recorded(network, rows(count))
    run(network, rows(1))
    recorded(network, rows(3))  # in the place of 2
    replays = Again.replays
    run(network, rows(1))
    assert Again.replays == replays + 1
    run(network, rows(2))
    assert Again.replays == replays + 1
    assert len(network.forward.calls) == 2


def test_a_round_longer_than_the_limit_is_not_recorded():
    network = toy(limit=3)
    for _ in range(3):
        for count in range(1, 5):
            run(network, rows(count))
    assert Again.captures == 0
    assert len(network.forward.calls) == 3


def test_a_limit_below_one():
    with pytest.raises(ConfigError, match="limit is 0"):
        graph_forward(Toy(), limit=0)


def test_failing_recordings(caplog):
    network, plain = toy(limit=8), Toy().eval()
    recorded(network, rows(9))
    Again.fail = RuntimeError("operation not permitted when stream is capturing\nadvice")
    for count in range(1, GIVE_UP + 3):
        for _ in range(3):
            x = rows(count)
            assert torch.equal(run(network, x).sample, run(plain, x).sample)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert record.getMessage() == (
        "Toy runs without a CUDA graph: recording it failed "
        "(RuntimeError: operation not permitted when stream is capturing)"
    )
    assert len(network.forward.failed) == GIVE_UP
    Again.fail = None
    replays = Again.replays
    for _ in range(3):
        run(network, rows(1))
        run(network, rows(9))  # recorded before: goes on
    assert Again.captures == 1
    assert Again.replays == replays + 3


def test_a_failed_call_is_not_tried_again():
    network = toy()
    Again.fail = RuntimeError("no")
    recorded(network, rows(1))
    Again.fail = None
    for _ in range(3):
        run(network, rows(1))
    assert Again.captures == 0
    recorded(network, rows(2))
    assert Again.captures == 1


def test_a_result_that_can_not_be_renewed(caplog):
    class Odd(Toy):
        def forward(self, hidden_states: Tensor) -> Any:
            return hidden_states, object()

    network = Odd().eval()
    graph_forward(network, recorder=Again)
    recorded(network, rows(3))
    assert "its result holds a object" in caplog.text


def test_errors_of_the_first_call_leave_nothing():
    network = toy()
    with pytest.raises(RuntimeError):
        run(network, torch.randn(3, 5))
    assert not network.forward.calls


def test_signature_name_and_documentation():
    network, plain = toy(), Toy()
    assert inspect.signature(network.forward) == inspect.signature(plain.forward)
    assert network.forward.__name__ == "forward"
    assert network.forward.__doc__ == "Documented."


def test_a_deep_copy_has_graphs_of_its_own():
    network = toy()
    recorded(network, rows(3))
    twin = copy.deepcopy(network)
    assert twin.forward.transformer is twin
    assert twin.forward.original.__self__ is twin
    assert not twin.forward.calls
    with torch.no_grad():
        twin.block.weight.zero_()
    recorded(twin, rows(3))
    assert Again.captures == 2
    plain = Toy().eval()
    assert torch.equal(run(network, rows(3)).sample, run(plain, rows(3)).sample)
    assert not torch.equal(run(twin, rows(3)).sample, run(plain, rows(3)).sample)


def test_install_again_and_remove():
    network = toy()
    recorded(network, rows(3))
    assert network.forward.memory() == 7
    first = network.forward
    graph_forward(network, limit=1, recorder=Again)
    assert network.forward is not first
    assert not isinstance(network.forward.original, GraphedForward)
    assert not first.calls
    ungraph_forward(network)
    ungraph_forward(network)
    assert "forward" not in vars(network)
    kept = network.forward = lambda x: x
    graph_forward(network, recorder=Again)
    ungraph_forward(network)
    assert network.forward is kept


def test_nothing_outlives_the_network():
    network = toy()
    recorded(network, rows(3))
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("way", ["function", "method"])
def test_compiled_networks_trace_the_original(way):
    torch.compiler.reset()
    network, plain = toy(), Toy().eval()
    network.runs = plain.runs = 0
    compiled: Any = network
    if way == "function":
        compiled = torch.compile(network, backend="eager", fullgraph=True)
    else:
        network.compile(backend="eager", fullgraph=True)
    for _ in range(3):
        got = run(compiled, rows(3), return_dict=False)[0]
        torch.testing.assert_close(got, run(plain, rows(3), return_dict=False)[0])
    assert Again.captures == 0
