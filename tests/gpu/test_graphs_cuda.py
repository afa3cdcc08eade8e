"""A packed FLUX transformer behind real CUDA graphs."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from packed_flux import arguments, build, run
from torch import Tensor

from dirotq.runtime.graphs import graph_forward, ungraph_forward

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

MIB = 2**20


@pytest.fixture(scope="module")
def plain():
    return build()


@pytest.fixture
def network(plain):
    twin = copy.deepcopy(plain)
    graph_forward(twin)
    yield twin
    ungraph_forward(twin)


def graphs(network: Any) -> list[Any]:
    return [graph for graph in network.forward.calls.values() if graph is not None]


def spied(monkeypatch: Any) -> list[int]:
    """Notes each time Python goes through the single block: eager, warming up and capturing."""
    seen: list[int] = []
    forward = FluxSingleTransformerBlock.forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(FluxSingleTransformerBlock, "forward", spy)
    return seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_replays_equal_eager_calls(network, plain, monkeypatch, mode):
    seen = spied(monkeypatch)
    with mode():
        for seed in range(5):
            call = arguments(seed)
            got = network(**call)[0]
            passes = len(seen)
            assert torch.equal(got, plain(**call)[0]), seed
            seen.pop()
            assert passes == (1 if seed == 0 else 3)  # eager; then a warm-up and the capture
    assert len(graphs(network)) == 1
    assert network.forward.memory() > 0


def test_results_stay(network, plain):
    """As guidance does: several results are held before any is read."""
    calls = [arguments(seed) for seed in range(6)]
    held = [run(network, **call) for call in calls]
    for call, got in zip(calls, held, strict=True):
        assert torch.equal(got, run(plain, **call))


def test_resolutions_and_batches_alternate(network, plain):
    shapes = [(64, 2), (96, 2), (64, 1), (100, 3)]
    for seed in range(5):
        held = []
        for tokens, batch in shapes:
            call = arguments(seed, tokens, batch)
            held.append((call, run(network, **call)))
        for call, got in held:
            assert torch.equal(got, run(plain, **call)), (seed, got.shape)
    assert len(graphs(network)) == len(shapes)


def test_more_kinds_than_the_limit(plain):
    network = copy.deepcopy(plain)
    graph_forward(network, limit=2)
    for _ in range(2):
        for tokens in (64, 80, 96, 112):
            for seed in range(4):
                call = arguments(seed, tokens)
                assert torch.equal(run(network, **call), run(plain, **call)), tokens
            assert len(graphs(network)) <= 2


@pytest.mark.parametrize("limit", [1, 3])
def test_memory_is_bounded(plain, limit):
    network = copy.deepcopy(plain)
    graph_forward(network, limit=limit)

    def once_through() -> int:
        for i in range(20):
            for seed in range(3):
                run(network, **arguments(seed, 128 + 16 * i))
        return network.forward.memory()

    first = once_through()
    reserved = torch.cuda.memory_reserved()
    for _ in range(2):
        assert once_through() <= 2 * first
    assert torch.cuda.memory_reserved() <= reserved + first + 64 * MIB
    network.forward.clear()
    torch.cuda.empty_cache()
    assert network.forward.memory() == 0


def test_memory_comes_back(plain):
    network = copy.deepcopy(plain)
    graph_forward(network)

    def record_and_clear() -> int:
        for tokens in (256, 1024):
            for seed in range(3):
                run(network, **arguments(seed, tokens))
        network.forward.clear()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    before = record_and_clear()  # workspaces stay
    for _ in range(3):
        assert record_and_clear() <= before + MIB


def test_a_pipelines_loop(network, plain):
    """Steps feed on each other, guidance calls twice, a callback edits the latents."""

    def sample(transformer: Any, callback: Callable[[int, Tensor], Tensor]) -> Tensor:
        positive, negative = arguments(1), arguments(2)
        latents = arguments(3)["hidden_states"]
        for step in range(8):
            time = torch.full((2,), 1 - step / 8, device="cuda").bfloat16()
            shared = {"hidden_states": latents, "timestep": time}
            with_text = run(transformer, **positive | shared)
            without = run(transformer, **negative | shared)
            latents = latents - 0.1 * (without + 2 * (with_text - without))
            latents = callback(step, latents)
        return latents

    def run_once(transformer: Any) -> tuple[Tensor, list[Tensor]]:
        kept: list[Tensor] = []

        def callback(step: int, latents: Tensor) -> Tensor:
            kept.append(latents)
            return latents.flip(1).contiguous() if step == 4 else latents

        return sample(transformer, callback), kept

    for _ in range(2):
        (got, ours), (want, theirs) = run_once(network), run_once(plain)
        assert torch.equal(got, want)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(graphs(network)) == 1


def test_weights_that_move(network, plain):
    for seed in range(3):
        run(network, **arguments(seed))
    network.to("cpu")
    torch.cuda.empty_cache()
    occupied = torch.empty(64 * MIB, device="cuda")  # the weights come back to other addresses
    network.to("cuda")
    for seed in range(4):
        call = arguments(seed)
        assert torch.equal(run(network, **call), run(plain, **call)), seed
    assert len(graphs(network)) == 1
    del occupied


def test_weights_written_in_place(network, plain):
    twin = copy.deepcopy(plain)
    for seed in range(3):
        run(network, **arguments(seed))
    for transformer in (network, twin):
        transformer.proj_out.weight.data.mul_(2)
    assert torch.equal(run(network, **arguments(7)), run(twin, **arguments(7)))


def test_streams_take_turns(network, plain):
    calls = [arguments(seed) for seed in range(12)]
    want = [run(plain, **call) for call in calls]
    for call in calls[:2]:
        run(network, **call)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got = []
    for i, call in enumerate(calls):
        with torch.cuda.stream(streams[i % 2]):
            got.append(run(network, **call))
    torch.cuda.synchronize()
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


def _synchronize(y: Tensor) -> None:
    torch.cuda.current_stream().synchronize()  # waits for the GPU, which a capture can't


def _run_out_of_memory(y: Tensor) -> None:
    if torch.cuda.is_current_stream_capturing():
        torch.empty(2**46, device="cuda")


def _raise(y: Tensor) -> None:
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("not now")


@pytest.mark.parametrize("trouble", [_synchronize, _run_out_of_memory, _raise])
def test_a_failed_capture_leaves_cuda_usable(plain, network, caplog, trouble):
    for seed in range(3):
        run(network, **arguments(seed))
    broken = copy.deepcopy(plain)
    inner = broken.forward

    def forward(**call: Any) -> Any:
        result = inner(**call)
        trouble(result[0])
        return result

    broken.forward = forward
    graph_forward(broken)
    stream = torch.cuda.current_stream()
    for seed in range(4):
        call = arguments(seed)
        assert torch.equal(run(broken, **call), run(plain, **call)), seed
        assert torch.cuda.current_stream() == stream
        assert torch.randn(8, device="cuda").isfinite().all()  # the generator isn't "captured"
    assert "recording it failed" in caplog.text
    assert not graphs(broken)
    # A tensor used on two streams is free again when both are done, so no capture seems under way.
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    shared, side = torch.empty(MIB, device="cuda"), torch.cuda.Stream()
    shared.record_stream(side)
    del shared
    torch.cuda.synchronize()
    torch.empty(1, device="cuda")
    assert torch.cuda.memory_allocated() <= before
    for seed in range(3):  # graphs recorded before and after
        for tokens in (64, 72):
            call = arguments(seed, tokens)
            assert torch.equal(run(network, **call), run(plain, **call)), (seed, tokens)
    assert len(graphs(network)) == 2


def test_inside_somebody_elses_capture(network, plain):
    call = arguments()
    for _ in range(3):
        run(network, **call)
    torch.cuda.synchronize()
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.graph(outer):
        y = run(network, **call)
    outer.replay()
    assert torch.equal(y, run(plain, **call))
    assert len(graphs(network)) == 1
