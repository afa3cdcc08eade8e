"""How close a sound is to the 16-bit model's sound of the same prompt and noise.

C channels, S samples.
"""

import torch
from torch import Tensor

LIMIT = 100.0
"""dB between sounds that are equal."""
WINDOW = 2048
"""Samples of a spectrum; a quarter of it apart."""
FLOOR = 1e-8
"""Power below which a spectrum is silence: that of noise of -80 dB of full scale."""


def likeness(got: Tensor, want: Tensor) -> dict[str, list[float]]:
    """Compute both measures of each pair of sounds, float [B, C, S]."""
    return {
        "sound_snr": snr(got, want).tolist(),
        "sound_lsd": log_spectral_distance(got, want).tolist(),
    }


def snr(got: Tensor, want: Tensor) -> Tensor:
    """Compute ‖want‖² / ‖got - want‖² in dB, float64 [B], within ±LIMIT.

    The waveform counts, as pixels do in PSNR: a shift in time is an error. Not made scale-invariant
    (SI-SDR: Le Roux et al. 2019), because a packed model has no reason to be louder.
    """
    signal, noise = (t.double().square().sum((1, 2)) for t in (want, got.double() - want))
    ratio = 10 * torch.log10(signal / noise)
    return torch.where(noise == 0, LIMIT, ratio).clamp(-LIMIT, LIMIT)  # of silence, too


def log_spectral_distance(got: Tensor, want: Tensor) -> Tensor:
    """Compute the log-spectral distance in dB, float64 [B] (Gray and Markel 1976).

    The root mean square over frequencies of the difference of power spectra in dB, averaged over
    windows and channels: phases don't count.
    """
    apart = _spectra(got) - _spectra(want)
    return apart.square().mean(-2).sqrt().mean((1, 2))


def _spectra(sound: Tensor) -> Tensor:
    """Return power spectra in dB, float64 [B, C, frequencies, windows]."""
    size = min(WINDOW, sound.shape[-1])
    window = torch.hann_window(size, dtype=torch.float64, device=sound.device)
    found = torch.stft(
        sound.double().flatten(0, 1), size, max(size // 4, 1), window=window, center=False,
        return_complex=True,
    )  # fmt: skip
    power = found.abs().square() / window.square().sum()
    return (10 * torch.log10(power.clamp_min(FLOOR))).unflatten(0, sound.shape[:2])
