"""A block computes the norm that the next one begins with; nothing may change that unseen."""

import pytest
import torch
from tiny_fused import blocks, call, fallen, inputs, off, original, quantize

from dirotq import accelerate
from dirotq.runtime import flux_fused, look_ahead


@pytest.fixture
def network():
    return quantize(original("flux", num_layers=3, num_single_layers=3))


@pytest.fixture
def used(monkeypatch):
    """Of every block's first norms, whether it had been computed ahead."""
    found = []
    norm_ahead = look_ahead.norm_ahead

    def noted(shared, *args):
        prologue = norm_ahead(shared, *args)
        found.append(any(ahead.prologue is prologue for ahead in shared.ahead))
        return prologue

    monkeypatch.setattr(flux_fused, "norm_ahead", noted)
    return found


def unfused(network):
    accelerate(network, fused=False)
    return call(network, "flux", torch.float32)


DOUBLES_THEN_SINGLES = [False] * 2 + [True] * 4 + [False] + [True] * 2


def test_every_norm_but_the_first_of_each_kind_is_computed_ahead(network, used):
    fell = fallen(network)
    got = call(network, "flux", torch.float32)
    assert used == DOUBLES_THEN_SINGLES
    assert not fell
    assert off(got, unfused(network)) < 0.02


def test_a_prologue_is_not_kept_for_the_next_forward(network, used):
    for scale in (1.0, 0.5):
        given = inputs("flux", torch.float32)
        given["hidden_states"] *= scale
        with torch.no_grad():
            network(**given, return_dict=False)
    assert used == 2 * DOUBLES_THEN_SINGLES
    assert network._dirotq_shared.ahead == ()


@pytest.mark.parametrize("in_place", [True, False])
def test_what_happens_to_the_stream_between_blocks_counts(network, used, in_place):
    def after(module, args, output):
        if in_place:
            output[1].mul_(0.5)
            return None
        return output[0], output[1] * 0.5

    for block in (blocks(network)[0], blocks(network)[4]):
        block.register_forward_hook(after)
    got = call(network, "flux", torch.float32)
    # In place, the text of a joint stream has the image's version too; else only the image changed.
    assert used[2] is False and used[3] is True
    assert used[8] is False
    assert off(got, unfused(network)) < 0.02


def test_controlnet_residuals(network, used):
    residual = torch.randn(3, 9, network.inner_dim)
    more = {"controlnet_block_samples": [residual] * 3}
    got = call(network, "flux", torch.float32, **more)
    assert used == [False] * 2 + [False, True] * 2 + [False] + [True] * 2
    accelerate(network, fused=False)
    assert off(got, call(network, "flux", torch.float32, **more)) < 0.02


def test_inference_mode_keeps_no_versions(network, used):
    with torch.inference_mode():
        got = network(**inputs("flux", torch.float32), return_dict=False)[0]
    assert not any(used)
    assert off(got.clone(), unfused(network)) < 0.02


def test_a_block_that_is_skipped(network, used):
    del network.single_transformer_blocks[1]
    got = call(network, "flux", torch.float32)
    assert used == [*DOUBLES_THEN_SINGLES[:7], False]
    assert off(got, unfused(network)) < 0.02
