import torch
from tiny_spec import tiny_spec

from dirotq.quantize.rotation import Rotation
from dirotq.quantize.smoothing import best, simulated, smoothing

D, N = 64, 48


def outliers() -> tuple[torch.Tensor, torch.Tensor]:
    """Activations with a few loud channels, and weights without."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, D, generator=generator)
    x[:, :3] *= 30
    return x, torch.randn(N, D, generator=generator)


def test_half_strength_levels_both_sides():
    x, w = outliers()
    m = smoothing(x.abs().amax(0), w, 0.5)
    ratio = (x * m).abs().amax(0) / (w / m).abs().amax(0)
    torch.testing.assert_close(ratio, ratio[0].expand(D), rtol=1e-4, atol=0)
    torch.testing.assert_close(m.log().mean(), torch.zeros(()), rtol=0, atol=1e-5)


def test_full_strength_levels_the_activations():
    x, w = outliers()
    levelled = (x * smoothing(x.abs().amax(0), w, 1.0)).abs().amax(0)
    torch.testing.assert_close(levelled, levelled[0].expand(D), rtol=1e-4, atol=0)


def test_dead_channels_stay_finite():
    x, w = outliers()
    x[:, 5], w[:, 6] = 0, 0
    for alpha in (0.0, 0.5, 1.0):
        m = smoothing(x.abs().amax(0), w, alpha)
        assert m.isfinite().all()
        assert (m > 0).all()


def candidate(alpha: float | None) -> tuple[Rotation, float | None]:
    x, w = outliers()
    smooth = torch.ones(D) if alpha is None else smoothing(x.abs().amax(0), w, alpha)
    spec = tiny_spec(smooth=True, weight_scale="group", act_scale="group", act_group=64)
    return Rotation.cut({"smooth": smooth}, spec), alpha


def test_the_best_candidate_is_the_one_that_errs_least():
    x, w = outliers()
    tried = [candidate(a) for a in (None, 0.25, 0.5, 1.0)]
    errors = {a: float((simulated(r, w, x, clip=False) - x @ w.T).norm()) for r, a in tried}
    chosen = best(tried, w, x, clip=False)
    assert errors[chosen] == min(errors.values())
    assert chosen is not None  # outliers are what smoothing is for
