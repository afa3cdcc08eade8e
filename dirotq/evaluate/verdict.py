"""Is the packed model still good: one sentence, from PSNR held against the noise floor.

The noise floor is the 16-bit model against itself, same prompts and noise, through other kernels
(stages/reference.py): nobody can ask a packed model to be closer than that. The words for a PSNR
are conventions of this project (docs/report.md), and the numbers stand beside them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dirotq.evaluate.fidelity import PSNR_LIMIT
from dirotq.evaluate.sounds import LIMIT
from dirotq.evaluate.statistics import Interval, difference_interval

MARGIN = 1.0
"""dB below the noise floor that count as none: a quarter more error than between 16-bit runs."""
OTHER_IMAGE = 20.0
"""dB below which an image shows something else (docs/quality.md)."""
WORDS = (
    (40.0, "close", "Still good: differences are hard to see"),
    (30.0, "small", "Good: small differences show side by side"),
    (OTHER_IMAGE, "visible", "Changed in detail: look at the pairs"),
    (-math.inf, "other", "Not the same images any more"),
)
"""(dB from which on, its name, its words)."""
SAME = LIMIT - 0.1
"""dB from which on a sound is the other one."""
FEW = 8
"""Prompts below which an interval says little."""


def verdict(images: Sequence[Mapping[str, Any]], scores: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``level``, ``headline`` and ``reasons`` (sentences) for the rows of a report.

    level  ``floor`` (no farther from the 16-bit images than the 16-bit model), ``unclear`` (too few
           prompts to tell it from that), ``close``, ``small``, ``visible`` or ``other``
    """
    packed = [float(row["psnr"]) for row in images]
    mean = sum(packed) / len(packed)
    level, words = next((name, said) for least, name, said in WORDS if mean >= least)
    reasons = [_distance(mean, packed)]
    if "floor" not in images[0]:
        reasons.append(
            "The noise floor was not measured (reference.floor=false): how far the 16-bit model is "
            "from itself is unknown."
        )
    else:
        floor = [float(row["floor"]["psnr"]) for row in images]
        apart = difference_interval(packed, floor)
        if apart.low >= -MARGIN:
            level, words = "floor", "Still good: no farther off than the 16-bit model from itself"
        elif apart.high >= 0:
            level, words = "unclear", "Still good, as far as these prompts tell"
        reasons.append(_against_floor(apart, sum(floor) / len(floor)))
    if others := sum(value < OTHER_IMAGE for value in packed):
        reasons.append(
            f"{others} of {len(packed)} images show something else (PSNR below {OTHER_IMAGE:g} dB)."
        )
    if found := scores.get("captioned", {}).get("difference"):
        reasons.append(_captioned(found))
    if "sound_snr" in scores:
        reasons.append(_sound(scores["sound_snr"], scores["sound_lsd"]))
    if len(packed) < FEW:
        reasons.append(f"{_prompts(len(packed))} are few: another set may tell otherwise.")
    return {"level": level, "headline": words, "reasons": reasons}


def _distance(mean: float, packed: Sequence[float]) -> str:
    steps = 255 * 10 ** (-mean / 20)
    return (
        f"PSNR to the 16-bit images is {mean:.1f} dB over {_prompts(len(packed))}: a difference of "
        f"{steps:.2g} of 255 brightness levels (root mean square). The worst prompt has "
        f"{min(packed):.1f} dB."
    )


def _against_floor(apart: Interval, floor: float) -> str:
    if floor > PSNR_LIMIT - 0.1:
        return (
            "The 16-bit model run again gives the same images here (no difference that is stored), "
            "so all of the difference is the packed model's."
        )
    return (
        f"The 16-bit model run again through other kernels is {floor:.1f} dB from itself; the "
        f"packed one is {abs(apart.mean):.1f} dB {'closer' if apart.mean > 0 else 'below that'} "
        f"(95 % interval of the difference: {apart.low:+.1f} to {apart.high:+.1f} dB)."
    )


def _captioned(found: Mapping[str, float]) -> str:
    points = {name: 100 * value for name, value in found.items()}
    apart = f"({points['low']:+.1f} to {points['high']:+.1f} points)"
    if points["low"] <= 0 <= points["high"]:
        return f"Captioned attributes: no difference from 16 bit could be shown {apart}."
    word = "more" if points["mean"] > 0 else "fewer"
    return f"{abs(points['mean']):.1f} points {word} of the captioned attributes show {apart}."


def _sound(
    snr: Mapping[str, Mapping[str, float]], distance: Mapping[str, Mapping[str, float]]
) -> str:
    if snr["packed"]["mean"] >= SAME:
        return "The sound is that of the 16-bit model."
    told = (
        f"The sound's error lies {snr['packed']['mean']:.1f} dB below the 16-bit sound (SNR), and "
        f"its spectra are {distance['packed']['mean']:.1f} dB from that sound's (log-spectral "
        "distance)"
    )
    if (floor := snr.get("floor", {}).get("mean")) is None:
        return f"{told}."
    same = "gives the same sound" if floor >= SAME else f"has an SNR of {floor:.1f} dB"
    return f"{told}. The 16-bit model run again {same}."


def _prompts(count: int) -> str:
    return f"{count} held-out prompt{'s' if count != 1 else ''}"
