"""report.html: one self-contained page with images, spectra, ranks, errors and bytes."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from dirotq.evaluate.fidelity import scales
from dirotq.evaluate.png import picture, png_url
from dirotq.evaluate.statistics import RESAMPLES

DIFFERENCE_GAIN = 4
"""Differences of images are shown this many times larger."""
LABELS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "captioned": "captioned attributes, share per image",
    "fid": "FID, attribute reader",
    "kid": "KID, attribute reader",
}
"""Metrics of ``report["scores"]``; learned ones keep the names that the configuration gave them."""


def write_report(
    path: Path, report: Mapping[str, Any], spectra: Mapping[str, Tensor], want: Tensor, got: Tensor
) -> None:
    """Render ``report`` (the content of report.json) with its figures.

    spectra    per block site, the share of energy outside of its 1, 2, ... leading directions
    want, got  image pairs, float [B, 3, H, W] in [0, 1]
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    environment.filters["number"] = _number
    template = environment.get_template("report.html.j2")
    pairs = [
        {
            "images": [
                png_url(w),
                png_url(g),
                png_url((DIFFERENCE_GAIN * (g - w).abs()).clamp(0, 1)),
            ],
            **numbers,
        }
        for w, g, numbers in zip(want, got, report["images"], strict=False)
    ]
    block = [site for site in report["sites"] if site["kind"] == "block"]
    figures = {
        "spectra": _spectra(spectra, {s["site"]: s["rank"] for s in block}),
        "depth": _depth(block),
        "bytes": _bytes(report["bytes"]),
    }
    page = template.render(
        report=report,
        pairs=pairs,
        figures=figures,
        gain=DIFFERENCE_GAIN,
        labels=LABELS,
        resamples=RESAMPLES,
        scales=scales(min(report["size"])),
    )
    path.write_text(page)


def write_pairs(path: Path, want: Tensor, got: Tensor) -> None:
    """Write one PNG with the 16-bit images in the upper row and the packed ones below them."""
    rows = [torch.cat(list(images), 2) for images in (want, got)]
    picture(torch.cat(rows, 1)).save(path)


def _number(value: float) -> str:
    """Write four figures or so, and no more digits than a table has room for."""
    if value and abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _spectra(spectra: Mapping[str, Tensor], ranks: Mapping[str, int]) -> str:
    """Draw the energy that is left outside of the r leading directions, per site."""
    figure, axes = _figure()
    for name, energy in spectra.items():
        left = energy.numpy()
        axes.plot(np.arange(1, len(left) + 1), left.clip(1e-6), linewidth=0.8, alpha=0.7)
        if 0 < ranks.get(name, 0) <= len(left):
            axes.plot(ranks[name], left[ranks[name] - 1].clip(1e-6), "k.", markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="rank of the branch (dots: as chosen)")
    axes.set_ylabel("share of energy left")
    axes.minorticks_off()
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")  # powers of ten cost more to typeset than the rest
    return _svg(figure)


def _depth(sites: Sequence[Mapping[str, Any]]) -> str:
    """Draw rank and output SQNR of every site, in the order of the network."""
    figure, axes = _figure()
    place = range(len(sites))
    axes.bar(place, [s["rank"] for s in sites], color="#c9d6ea")
    axes.set(xlabel="site, in network order", ylabel="rank (bars)")
    error = axes.twinx()
    error.plot(place, [s["sqnr_db"] for s in sites], "o-", color="#b5442e", markersize=3)
    error.set_ylabel("output SQNR, dB (line)")
    return _svg(figure)


def _bytes(size: Mapping[str, int]) -> str:
    """Draw where the packed transformer's bytes are."""
    figure, axes = _figure(height=1.7)
    parts = {k: v for k, v in size.items() if k not in ("total", "original") and v}
    left = 0.0
    for name, count in parts.items():
        axes.barh(0, count / 1e6, left=left, label=f"{name} {count / 1e6:.2f}")
        left += count / 1e6
    axes.set(yticks=[], xlabel=f"MB (original {size['original'] / 1e6:.2f})")
    figure.legend(ncols=6, fontsize=7, loc="outside upper center", frameon=False)
    return _svg(figure)


def _figure(height: float = 3.0) -> tuple[Any, Any]:
    # The object interface: no global pyplot state, no display needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
