"""What was lost where: charts and tables of a report's sites, with their names."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from dirotq.evaluate.charts import Axis, Dot, Series, chart

POINTS = 32
"""Ranks at which a spectrum is drawn."""
LEAST = 1e-4
"""Share of energy below which a spectrum isn't drawn: what is lost there, nobody sees."""
Sites = Sequence[Mapping[str, Any]]


def depth_chart(sites: Sites) -> str:
    """Draw the output SQNR of every site in network order; the worst one is named."""
    worst = min(range(len(sites)), key=lambda i: float(sites[i]["sqnr_db"]), default=-1)
    dots = [
        Dot(
            _told(site),
            place + 1,
            site["sqnr_db"],
            _style(site),
            label=site["site"] if place == worst else "",
            wordy=True,
        )
        for place, site in enumerate(sites)
    ]
    title = "Output SQNR of every site by depth"
    return chart(title, Axis("site, in network order"), Axis("output SQNR, dB"), dots=dots)


def timestep_chart(timesteps: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw the mean output SQNR of each kind of site by timestep, the noisiest first.

    rows  of :func:`kinds`; the first one, the worst, is named
    """
    lines: list[Series] = []
    for row in rows:
        points = [(i, v) for i, v in enumerate(row["by_timestep"]) if v is not None]
        if points:
            said, style = ("", "") if lines else (row["name"], " strong")
            lines.append(Series(row["name"], points, _style(row["worst"]) + style, said))
    ticks = [(float(i), f"{t:.3g}") for i, t in enumerate(timesteps)]
    return chart(
        "Output SQNR by timestep, one line per kind of site",
        Axis("timestep, from noise to image", ticks=ticks),
        Axis("output SQNR, dB"),
        lines=lines,
    )


def spectrum_chart(spectra: Mapping[str, Tensor], ranks: Mapping[str, int]) -> str:
    """Draw per kind of site the mean share of energy outside of the leading directions.

    A dot is the middle one of the ranks that its sites have. Sites one by one are in a table.
    """
    groups: dict[tuple[str, int], list[str]] = defaultdict(list)
    for name, left in spectra.items():
        groups[_kind(name)[0], len(left)].append(name)
    lines, dots = [], []
    for (kind, count), names in groups.items():
        left = torch.stack([spectra[name] for name in names]).float().mean(0).clamp_min(LEAST)
        places = sorted({round(count ** (i / (POINTS - 1))) for i in range(POINTS)})
        lines.append(Series(kind, [(r, v) for r in places if (v := float(left[r - 1])) > LEAST]))
        chosen = sorted(ranks.get(name, 0) for name in names)
        middle = chosen[len(chosen) // 2]
        if 0 < middle <= count:
            share = float(left[middle - 1])
            span = f"{chosen[0]} to {chosen[-1]}" if chosen[0] < chosen[-1] else f"{middle}"
            said = f"{kind}: rank {span}; {share:.2%} of the energy outside of {middle} directions"
            dots.append(Dot(said, middle, share, "b"))
    return chart(
        "Energy outside of the leading directions, one line per kind of site",
        Axis("directions kept (dots: as chosen)", log=True),
        Axis("share of energy left", log=True),
        lines=[line for line in lines if line.points],
        dots=dots,
    )


def kinds(sites: Sites) -> list[dict[str, Any]]:
    """Sum up sites that differ in their block's number alone; the worst kind first.

    Each row has ``name``, ``count``, ``mean``, ``worst`` (a site) and its ``block`` (a number, or
    nothing), ``by_timestep``.
    """
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for site in sites:
        groups[_kind(site["site"])[0]].append(site)
    rows: list[dict[str, Any]] = []
    for name, alike in groups.items():
        worst = min(alike, key=lambda site: float(site["sqnr_db"]))
        rows.append(
            {
                "name": name,
                "count": len(alike),
                "mean": fmean(site["sqnr_db"] for site in alike),
                "worst": worst,
                "block": _kind(worst["site"])[1],
                "by_timestep": _mean_columns([site["by_timestep"] for site in alike]),
            }
        )
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


def _kind(site: str) -> tuple[str, str]:
    """Return a site's name without its block's number, and that number."""
    found = re.search(r"(?<=\.)\d+(?=\.|$)", site)
    if not found:
        return site, ""
    return f"{site[: found.start()]}*{site[found.end() :]}", found[0]


def _style(site: Mapping[str, Any]) -> str:
    return "a" if site["kind"] == "block" else "b"


def _mean_columns(columns: Sequence[Sequence[float | None]]) -> list[float | None]:
    known = [[v for v in cells if v is not None] for cells in zip(*columns, strict=True)]
    return [fmean(values) if values else None for values in known]


def _told(site: Mapping[str, Any]) -> str:
    rank = f", rank {site['rank']}" if site["rank"] else ""
    return f"{site['site']}: {site['sqnr_db']:.1f} dB, {site['format']}{rank}"
