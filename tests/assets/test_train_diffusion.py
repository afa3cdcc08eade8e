"""Training moves the networks, keeps an average, and can be interrupted by a checkpoint."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from dirotq.assets import tiny_pixart
from dirotq.assets import train_diffusion as module
from dirotq.assets.captions import captions_of
from dirotq.assets.color_roles import color_roles
from dirotq.assets.denoisers import Denoiser, FluxDenoiser, PixArtDenoiser
from dirotq.assets.scenes import sample_scenes
from dirotq.assets.schedule import set_rate, timed_steps
from dirotq.assets.tiny_flux import build_t5, train_tokenizers
from dirotq.assets.train_diffusion import swapped, train_diffusion
from dirotq.assets.training_pool import Pool, tokenize


@pytest.fixture(autouse=True)
def attention_backends() -> Iterator[None]:
    """Training chooses among them for its whole process."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture(scope="module")
def tokenizers() -> tuple[CLIPTokenizer, T5Tokenizer]:
    scenes = sample_scenes(300, torch.Generator().manual_seed(1))
    return train_tokenizers(captions_of(scenes, seed=1))


def denoiser_of(kind: str, tokenizers: tuple[CLIPTokenizer, T5Tokenizer]) -> Denoiser:
    if kind == "flux":
        return FluxDenoiser.untrained(tokenizers)
    t5 = build_t5(tokenizers[1])
    return PixArtDenoiser(transformer=tiny_pixart.build_transformer(), t5=t5, dropout=0.1)


@pytest.mark.parametrize("kind", ["flux", "pixart"])
def test_a_few_steps_train_every_network(
    kind: str, tokenizers: tuple[CLIPTokenizer, T5Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Six steps, whatever the clock says.
    monkeypatch.setattr(module, "timed_steps", lambda _: ((i, i / 6) for i in range(6)))
    torch.manual_seed(0)
    scenes = sample_scenes(4, torch.Generator().manual_seed(1))
    networks = denoiser_of(kind, tokenizers)
    before = [p.detach().clone() for p in networks.parameters()]
    clip_ids, t5_ids = tokenize(captions_of(scenes, seed=1), tokenizers)
    pool = Pool(
        latents=torch.randn(4, 4, 8, 8).bfloat16(),
        clip_ids=torch.from_numpy(clip_ids),
        t5_ids=torch.from_numpy(t5_ids),
        roles=torch.from_numpy(color_roles(scenes.numpy(), t5_ids, tokenizers[1])),
        ordered=torch.tensor([2]),
    )
    checkpoints: list[Tensor] = []
    report = train_diffusion(
        networks,
        pool,
        seconds=4,
        batch=2,
        peak_rate=1e-3,
        warmup=1,
        emphasis=0.5,
        compiled=False,
        checkpoint=lambda: checkpoints.append(networks.parameters()[0].clone()),
        checkpoint_every=2,
    )
    assert report["steps"] == 6
    assert 0 < report["role_accuracy"] <= 1
    assert len(checkpoints) == 1
    moved = [not torch.equal(a, b) for a, b in zip(before, networks.parameters(), strict=True)]
    assert sum(moved) / len(moved) > 0.9
    assert not any(network.training for network in networks.modules())


def test_swapped_restores_even_after_an_error() -> None:
    weights, others = [torch.ones(3)], [torch.zeros(3)]
    try:
        with swapped(weights, others):
            assert weights[0].sum() == 0
            raise KeyError
    except KeyError:
        pass
    assert weights[0].sum() == 3


def test_rate_warms_up_and_falls_to_two_percent() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)

    def rate(step: int, fraction: float) -> float:
        set_rate(optimizer, 2.0, step, fraction, warmup=10)
        return optimizer.param_groups[0]["lr"]

    assert rate(0, 0.0) == 0.2
    assert rate(100, 0.0) == 2.0
    assert abs(rate(100, 1.0) - 0.04) < 1e-9


def test_timed_steps_stop_in_time() -> None:
    steps = list(timed_steps(0.02))
    assert [step for step, _ in steps] == list(range(len(steps)))
    assert all(0 <= fraction < 1 for _, fraction in steps)
