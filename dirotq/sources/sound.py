"""The sound that a pipeline makes beside a video: its samples, and a file of them."""

import wave
from pathlib import Path
from typing import Any

from torch import Tensor

PCM = 32767
"""A sample of 1.0 in a file of 16-bit samples."""


def sound_of(made: Any) -> Tensor | None:
    """Return what a pipeline made for the ear: float32 on the CPU, [B, channels, samples] in
    [-1, 1]; None where it makes no sound.
    """
    sound = getattr(made, "audio", None)
    return sound.float().cpu() if isinstance(sound, Tensor) else None


def sampling_rate(pipe: Any) -> int:
    """Return the samples per second of a pipeline's sound."""
    return int(pipe.vocoder.config.output_sampling_rate)


def write_sound(file: Path, sound: Tensor, rate: int) -> None:
    """Write float [channels, samples] as a WAV file of 16-bit samples; beyond [-1, 1] is cut."""
    samples = (sound.clamp(-1, 1) * PCM).round().short()
    with wave.open(str(file), "wb") as out:
        out.setnchannels(len(samples))
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.T.contiguous().numpy().astype("<i2").tobytes())
