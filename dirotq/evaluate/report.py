"""report.html: is the model still good, how small, how fast, and what was lost where. One file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirotq.evaluate.fidelity import PSNR_LIMIT, scales
from dirotq.evaluate.losses import depth_chart, heat, kinds, spectrum_chart, timestep_chart
from dirotq.evaluate.pictures import embed
from dirotq.evaluate.png import picture
from dirotq.evaluate.statistics import RESAMPLES
from dirotq.evaluate.web import render, script

DIFFERENCE_GAIN = 4
"""Differences of images are shown this many times larger."""
IMAGE_BYTES = 4_200_000
"""Of all pairs together, as they stand in the page; a page stays below 5 MB."""
PROMPT_ROWS = 100
"""Prompts in the table of all of them, the worst ones."""
SMALL = 384
"""Pixels that an image is enlarged to, by a whole number, where it is smaller."""
LABELS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "sound_snr": "SNR of the sound, dB",
    "sound_lsd": "log-spectral distance of the sound, dB",
    "captioned": "captioned attributes, share per image",
    "fid": "FID, attribute reader",
    "kid": "KID, attribute reader",
}
"""Metrics of ``report["scores"]``; learned ones keep the names that the configuration gave them."""
PARTS = {
    "codes": "4-bit codes",
    "scales": "scales",
    "basis": "bases and rotations",
    "protected": "protected directions",
    "bias": "biases",
    "kept": "kept in 16 bits",
}
"""Categories of ``report["bytes"]`` (dirotq/packed/swap.py)."""


def worst_first(images: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """Return the places of the ``count`` images with the lowest PSNR, the worst one first."""
    return sorted(range(len(images)), key=lambda i: float(images[i]["psnr"]))[:count]


def write_report(
    path: Path,
    report: Mapping[str, Any],
    spectra: Mapping[str, Tensor],
    shown: Sequence[int],
    want: Tensor,
    got: Tensor,
) -> None:
    """Render ``report`` (the content of report.json) with its figures.

    spectra    per block site, the share of energy outside of its 1, 2, ... leading directions
    shown      places in ``report["images"]`` of the image pairs, in the order to show
    want, got  these pairs, float [B, 3, H, W] in [0, 1]
    """
    budget = IMAGE_BYTES // max(len(shown), 1)
    pairs = [
        _pair(report["images"][index], w, g, budget)
        for index, w, g in zip(shown, want, got, strict=True)
    ]
    sites = [site for site in report["sites"] if site["sqnr_db"] is not None]
    rows = kinds(sites)  # none, of a model that was packed from its weights alone
    ranks = {site["site"]: site["rank"] for site in report["sites"] if site["kind"] == "block"}
    left = {
        name: float(e[r - 1]) for name, e in spectra.items() if 0 < (r := ranks[name]) <= len(e)
    }
    page = render(
        "report.html.j2",
        report=report,
        pairs=pairs,
        script=script("pairs.js.j2"),
        worst=rows[:1],
        least=rows[1:][-1:],
        lost=[_lost(report, part, spectra, ranks) for part in report.get("denoisers", [""])],
        energy_left=left,
        parts=_parts(report["bytes"]),
        prompts=[report["images"][i] for i in worst_first(report["images"], PROMPT_ROWS)],
        on_cpu="reference path" in report["devices"]["packed"],
        speed=_speed(report),
        stored_limit=PSNR_LIMIT - 0.1,
        gain=DIFFERENCE_GAIN,
        labels=LABELS,
        resamples=RESAMPLES,
        scales=scales(min(report["size"])),
    )
    # Half of a letter, as a damaged prompt file may have, is shown by its number.
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def _lost(
    report: Mapping[str, Any], part: str, spectra: Mapping[str, Tensor], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """Return what the template shows of one denoiser's sites; of all where ``part`` is ""."""
    begins = f"{part}." if part else ""
    sites = [
        site
        for site in report["sites"]
        if site["sqnr_db"] is not None and site["site"].startswith(begins)
    ]
    # An expert serves some of the timesteps.
    seen = [
        i
        for i, _ in enumerate(report["timesteps"])
        if not part or any(s["by_timestep"] and s["by_timestep"][i] is not None for s in sites)
    ]
    told = [
        {**s, "by_timestep": [s["by_timestep"][i] for i in seen if s["by_timestep"]]} for s in sites
    ]
    timesteps, rows = [report["timesteps"][i] for i in seen], kinds(told)
    return {
        "name": part,
        "timesteps": timesteps,
        "depth": depth_chart(sites),
        "by_timestep": timestep_chart(timesteps, rows),
        "spectrum": spectrum_chart(
            {name: left for name, left in spectra.items() if name.startswith(begins)}, ranks
        ),
        "kinds": list(zip(rows, heat(rows), strict=True)),
    }


def write_pairs(path: Path, want: Tensor, got: Tensor) -> None:
    """Write one PNG with the 16-bit images in the upper row and the packed ones below them."""
    rows = [torch.cat(list(images), 2) for images in (want, got)]
    picture(torch.cat(rows, 1)).save(path)


def _pair(numbers: Mapping[str, Any], want: Tensor, got: Tensor, budget: int) -> dict[str, Any]:
    """Return what the template shows of one pair; the difference is taken before compression.

    The difference only says where to look: it gets a quarter of the bytes at most.
    """
    apart = (DIFFERENCE_GAIN * (got - want).abs()).clamp(0, 1)
    difference = embed([picture(apart)], budget // 4)
    shown = embed([picture(want), picture(got)], budget - sum(map(len, difference.urls)))
    height, width = want.shape[-2:]
    return {
        **numbers,
        "urls": [*shown.urls, *difference.urls],
        "stored": shown.stored,
        "width": width,
        "height": height,
        "wide": width * max(1, SMALL // width),
    }


def _speed(report: Mapping[str, Any]) -> str:
    """Compare both times in words, or return nothing where they are of different devices."""
    seconds, devices = report["seconds_per_image"], report["devices"]
    if devices["packed"] != devices["original"] or not min(seconds.values()) > 0:
        return ""
    ratio = seconds["original"] / seconds["packed"]
    return f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"


def _parts(size: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return categories of the packed transformer: name, bytes, share of the original's bytes."""
    return [
        {"name": PARTS.get(name, name), "bytes": count, "share": count / size["original"]}
        for name, count in size.items()
        if name not in ("total", "original") and count
    ]
