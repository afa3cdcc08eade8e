"""Replaying block by block gives what the transformer itself gives."""

import gc

import pytest
import torch
from greenlet import greenlet
from tiny_line import TEXT, build_transformer

from dirotq.calibrate.replay import Replay
from dirotq.models.call import Call
from dirotq.models.flux import FLUX
from dirotq.models.skeleton import empty_transformer
from dirotq.sources.weights import Weights


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    transformer = build_transformer(num_layers=2, num_single_layers=2)
    folder = tmp_path_factory.mktemp("replay") / "transformer"
    transformer.save_pretrained(folder, max_shard_size="300KB")
    return transformer, Weights(folder)


def call(seed: int, tokens: int = 16) -> Call:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return Call(
        (),
        {
            "hidden_states": draw(1, tokens, 16),
            "encoder_hidden_states": draw(1, 8, TEXT),
            "pooled_projections": draw(1, 128),
            "timestep": torch.tensor([0.5]),
            "img_ids": torch.zeros(tokens, 3),
            "txt_ids": torch.zeros(8, 3),
        },
    )


@pytest.fixture
def replay(real):
    transformer, weights = real
    empty = empty_transformer(transformer.config, type(transformer))
    blocks = list(dict.fromkeys(s.block for s in FLUX.sites(transformer) if s.block))
    return Replay(empty, weights, blocks, device=torch.device("cpu"), dtype=torch.float32)


def outputs(replay: Replay, calls: list[Call]) -> list[torch.Tensor]:
    for step in replay.steps(calls):
        step.run()
    return replay.outputs


def test_the_output_is_the_transformers_own(real, replay):
    calls = [call(1), call(2, tokens=9), call(3)]
    for one, output in zip(calls, outputs(replay, calls), strict=True):
        with torch.no_grad():
            want = real[0](**one.kwargs, return_dict=False)[0]
        torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)
        assert not output.requires_grad


def test_one_block_at_a_time_has_weights_and_every_call_passes_it(replay):
    seen = []
    for step in replay.steps([call(1), call(2)]):
        module = replay.transformer.get_submodule(step.block)
        assert not any(p.is_meta for p in module.parameters())
        others = [replay.transformer.get_submodule(b) for b in replay.blocks if b != step.block]
        assert all(p.is_meta for other in others for p in other.parameters())
        passed: list[int] = []
        hook = module.register_forward_hook(lambda *_, to=passed: to.append(replay.current))
        assert passed == []
        step.run()
        hook.remove()
        seen.append((step.block, passed))
        assert torch.is_grad_enabled()  # no context of the replay's is open in the loop's body
    assert seen == [(block, [0, 1]) for block in replay.blocks]


def test_a_step_that_nobody_ran_runs_by_itself(replay):
    (want,) = outputs(replay, [call(1)])
    assert [step.block for step in replay.steps([call(1)])] == list(replay.blocks)
    assert torch.equal(replay.outputs[0], want)


def test_it_can_run_again_with_other_calls(replay):
    (first,) = outputs(replay, [call(1)])
    assert torch.equal(outputs(replay, [call(1), call(5)])[0], first)


def under_way() -> list[greenlet]:
    return [o for o in gc.get_objects() if type(o) is greenlet and o.parent and not o.dead]


def test_what_goes_wrong_inside_is_raised_and_nothing_stays_behind(replay):
    broken = call(1)
    broken.kwargs["hidden_states"] = torch.zeros(1, 16, 5)
    with pytest.raises(RuntimeError):
        outputs(replay, [call(1), broken])
    assert not under_way()
    assert len(outputs(replay, [call(1)])) == 1


def test_a_loop_that_is_left_early_leaves_no_call_behind(replay):
    def interrupted():
        for step in replay.steps([call(1), call(2)]):
            assert len(under_way()) == 2
            if step.block == replay.blocks[1]:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not under_way()
    assert len(outputs(replay, [call(1)])) == 1


def test_the_size_of_a_waiting_call_is_that_of_its_activations(replay):
    tokens, width = 16 + 8, 64
    assert replay._state_bytes(call(1)) >= 4 * tokens * width
    assert replay._state_bytes(call(1, tokens=160)) > 4 * replay._state_bytes(call(1))
    assert not under_way()


@pytest.mark.parametrize("walk", ["steps", "loaded"])
def test_no_more_than_two_blocks_wait_for_a_device(replay, monkeypatch, walk):
    """Kernels that are queued hold on to their block's weights."""
    queued: list[int] = []

    class Event:
        def __init__(self):
            queued.append(id(self))

        def synchronize(self):
            queued.remove(id(self))

    monkeypatch.setattr(replay._aside, "mark", Event)
    most = 0
    for _ in replay.steps([call(1)]) if walk == "steps" else replay.loaded(replay.blocks):
        most = max(most, len(queued))
    assert most == len(queued) == 1  # beside the block that passes
