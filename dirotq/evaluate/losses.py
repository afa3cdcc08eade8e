"""What was lost where: charts and tables of a report's sites, with their names."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from dirotq.evaluate.charts import Axis, Dot, Series, chart

POINTS = 32
"""Ranks at which a spectrum is drawn."""
Sites = Sequence[Mapping[str, Any]]


def depth_chart(sites: Sites) -> str:
    """Draw the output SQNR of every site in network order."""
    dots = [
        Dot(_told(site), place + 1, site["sqnr_db"], "b" if site["kind"] != "block" else "a")
        for place, site in enumerate(sites)
    ]
    title = "Output SQNR of every site by depth"
    return chart(title, Axis("site, in network order"), Axis("output SQNR, dB"), dots=dots)


def timestep_chart(timesteps: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the mean output SQNR of each kind of site by timestep, the noisiest first."""
    lines = [
        Series(row["name"], [(i, v) for i, v in enumerate(row["by_timestep"]) if v is not None])
        for row in rows
    ]
    ticks = [(float(i), f"{t:.3g}") for i, t in enumerate(timesteps)]
    return chart(
        "Output SQNR by timestep, one line per kind of site",
        Axis("timestep, from noise to image", ticks=ticks),
        Axis("output SQNR, dB"),
        lines=[line for line in lines if line.points],
    )


def spectrum_chart(spectra: Mapping[str, Tensor], ranks: Mapping[str, int]) -> str:
    """Draw per site the share of energy outside of its leading directions, and the rank chosen."""
    lines, dots = [], []
    for name, left in spectra.items():
        count = len(left)
        places = sorted({round(count ** (i / (POINTS - 1))) for i in range(POINTS)})
        lines.append(Series(name, [(r, max(float(left[r - 1]), 1e-6)) for r in places]))
        if 0 < (rank := ranks.get(name, 0)) <= count:
            share = float(left[rank - 1])
            said = f"{name}: {share:.2%} of the energy outside of {rank} directions"
            dots.append(Dot(said, rank, max(share, 1e-6), "b"))
    return chart(
        "Energy outside of the leading directions, one line per site",
        Axis("directions kept (dots: as chosen)", log=True),
        Axis("share of energy left", log=True),
        lines=lines,
        dots=dots,
    )


def kinds(sites: Sites) -> list[dict[str, Any]]:
    """Sum up sites that differ in their block's number alone; the worst kind first.

    Each row has ``name``, ``count``, ``mean``, ``worst`` (a site), ``by_timestep``.
    """
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for site in sites:
        groups[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", site["site"], count=1)].append(site)
    rows = [
        {
            "name": name,
            "count": len(alike),
            "mean": fmean(site["sqnr_db"] for site in alike),
            "worst": min(alike, key=lambda site: float(site["sqnr_db"])),
            "by_timestep": _mean_columns([site["by_timestep"] for site in alike]),
        }
        for name, alike in groups.items()
    ]
    return sorted(rows, key=lambda row: float(row["mean"]))


def heat(rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return per row and timestep how strongly its cell is coloured: 0 the best, 60 the worst."""
    known = [value for row in rows for value in row["by_timestep"] if value is not None]
    if not known:
        return [[] for _ in rows]
    low, span = min(known), max(max(known) - min(known), 1e-9)
    return [
        [0 if v is None else round(60 * (1 - (v - low) / span)) for v in row["by_timestep"]]
        for row in rows
    ]


def _mean_columns(columns: Sequence[Sequence[float | None]]) -> list[float | None]:
    known = [[v for v in cells if v is not None] for cells in zip(*columns, strict=True)]
    return [fmean(values) if values else None for values in known]


def _told(site: Mapping[str, Any]) -> str:
    rank = f", rank {site['rank']}" if site["rank"] else ""
    return f"{site['site']}: {site['sqnr_db']:.1f} dB, {site['format']}{rank}"
