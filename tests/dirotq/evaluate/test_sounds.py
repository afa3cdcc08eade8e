import pytest
import torch

from dirotq.evaluate.sounds import LIMIT, likeness, log_spectral_distance, snr

DRAW = torch.Generator().manual_seed(0)
WANT = torch.randn(3, 2, 6000, generator=DRAW) / 10


def test_an_error_of_a_tenth_is_20_db():
    assert snr(0.9 * WANT, WANT).tolist() == pytest.approx([20.0] * 3, abs=1e-4)
    assert snr(torch.zeros_like(WANT), WANT).tolist() == pytest.approx([0.0] * 3)


@pytest.mark.parametrize("samples", [1, 18, 6000])
def test_equal_sounds_are_at_the_limit(samples):
    same = WANT[..., :samples]
    found = likeness(same, same)
    assert found == {"sound_snr": [LIMIT] * 3, "sound_lsd": [0.0] * 3}


def test_silence_has_finite_scores():
    silence = torch.zeros(1, 2, 100)
    assert likeness(silence, silence) == {"sound_snr": [LIMIT], "sound_lsd": [0.0]}
    assert likeness(WANT[:1, :, :100], silence)["sound_snr"] == [-LIMIT]


def test_spectra_know_loudness_and_no_phase():
    assert log_spectral_distance(2 * WANT, WANT).tolist() == pytest.approx([6.0206] * 3, abs=1e-3)
    assert log_spectral_distance(-WANT, WANT).tolist() == [0.0] * 3
