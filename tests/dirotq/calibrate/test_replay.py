"""Replaying block by block gives what the transformer itself gives."""

from contextlib import contextmanager

import pytest
import torch
from tiny_line import TEXT, build_transformer

from dirotq.calibrate.replay import Walk
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


def walk(real, **options) -> tuple[Walk, list[str]]:
    transformer, weights = real
    empty = empty_transformer(transformer.config, type(transformer))
    blocks = list(dict.fromkeys(s.block for s in FLUX.sites(transformer) if s.block))
    options = {"device": torch.device("cpu"), "dtype": torch.float32} | options
    return Walk(empty, weights, blocks, **options), blocks


def test_the_output_is_the_transformers_own(real):
    calls = [call(1), call(2, tokens=9), call(3)]
    got = walk(real)[0].run(calls)
    for one, output in zip(calls, got, strict=True):
        with torch.no_grad():
            want = real[0](**one.kwargs, return_dict=False)[0]
        torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)


def test_one_block_at_a_time_has_weights_and_every_call_passes_it(real):
    walker, blocks = walk(real)
    seen = []

    @contextmanager
    def visit(block, module):
        assert not any(p.is_meta for p in module.parameters())
        others = [walker.transformer.get_submodule(b) for b in blocks if b != block]
        assert all(p.is_meta for other in others for p in other.parameters())
        passed = []
        hook = module.register_forward_hook(lambda *_: passed.append(walker.current))
        yield
        hook.remove()
        seen.append((block, passed))

    walker.run([call(1), call(2)], visit)
    assert seen == [(block, [0, 1]) for block in blocks]


def test_it_can_run_again_with_other_calls(real):
    walker, _ = walk(real)
    first = walker.run([call(1)])[0]
    assert torch.equal(walker.run([call(1), call(5)])[0], first)


def test_what_goes_wrong_inside_is_raised_and_nothing_stays_behind(real):
    walker, _ = walk(real)
    broken = call(1)
    broken.kwargs["hidden_states"] = torch.zeros(1, 16, 5)
    with pytest.raises(RuntimeError):
        walker.run([call(1), broken])
    hooks = [m._forward_pre_hooks for m in walker.transformer.modules()]
    assert not any(hooks)
    assert len(walker.run([call(1)])) == 1


def test_the_size_of_a_waiting_call_is_that_of_its_activations(real):
    walker, _ = walk(real)
    tokens, width = 16 + 8, 64
    assert walker.state_bytes(call(1)) >= 4 * tokens * width
    assert walker.state_bytes(call(1, tokens=160)) > 4 * walker.state_bytes(call(1))
