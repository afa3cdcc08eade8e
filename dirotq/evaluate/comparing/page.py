"""The page of a comparison, its table as CSV, and all of its numbers as JSON."""

import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError
from dirotq.evaluate.charts import Axis, Dot, Series, chart
from dirotq.evaluate.comparing.pairing import MOST, Pair, compared
from dirotq.evaluate.comparing.runs import Run, labels, sources
from dirotq.evaluate.web import render, script
from dirotq.pipeline.disk import replacing
from dirotq.pipeline.provenance import versions

FORMULA = ("=", "+", "-", "@")


def write_comparison(files: Sequence[Path], runs: Sequence[Run], notes: Sequence[str]) -> list[str]:
    """Write page, CSV and JSON; return notes about what can't be compared.

    notes  what is left out, for the page

    Raises ConfigError if a file can't be written.
    """
    names, pairs = labels(runs), compared(runs)
    groups = list(sources(runs).values())
    fronts = {run.name for group in groups for run in front(group)}
    numbers = {run.name: place + 1 for place, run in enumerate(runs)}
    more = _cautions(runs)
    table = [_row(run, names[run.name], run.name in fronts) for run in runs]
    head = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "version": versions()["dirotq"] or "of a checkout",
        "notes": [*notes, *more],
    }
    against = _against_best(runs, groups, pairs)
    content = head | {"runs": table, "pairs": [_told(pair, runs) for pair in pairs]}
    page = render(
        "comparing/compare.html.j2",
        **head,
        rows=[row | {"against": said} for row, said in zip(table, against, strict=True)],
        charts=[_chart(g, names, numbers, fronts) for g in groups if len(g) > 1],
        script=script("comparing/compare.js.j2"),
        pairs=[[p.first, p.second, *_rounded(p), p.closer] for p in pairs],
        counts=[len(run.psnr_N) for run in runs],
        most=MOST,
    )
    texts = (page, _csv(table), json.dumps(content, indent=1, allow_nan=False) + "\n")
    for file, text in zip(files, texts, strict=True):
        try:
            with replacing(file) as scratch:
                # A lone surrogate, as names of files may have, is shown by its number.
                scratch.write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(f"{file} can't be written: {error.strerror}") from error
    return more


def front(group: Sequence[Run]) -> list[Run]:
    """Return the runs that no other beats in bits and in PSNR, by bits (the Pareto front)."""
    best: list[Run] = []
    for run in sorted(group, key=lambda run: (run.bits, -run.psnr.mean)):
        if not best or run.psnr.mean > best[-1].psnr.mean:
            best.append(run)
    return best


def _row(run: Run, label: str, is_front: bool) -> dict[str, Any]:
    return {
        "run": run.name,
        "label": label,
        "model": run.model,
        "method": run.method,
        "date": run.date,
        "bits_per_parameter": run.bits,
        "bytes": run.bytes,
        "bytes_original": run.original,
        "compression": run.original / run.bytes,
        "seconds_per_image": run.seconds,
        "device": run.device,
        **{f"psnr{'' if k == 'mean' else f'_{k}'}": v for k, v in asdict(run.psnr).items()},
        **{f"ssim{'' if k == 'mean' else f'_{k}'}": v for k, v in asdict(run.ssim).items()},
        "prompts": len(run.psnr_N),
        "level": run.level,
        "verdict": run.verdict,
        "front": is_front,
    }


def _told(pair: Pair, runs: Sequence[Run]) -> dict[str, Any]:
    return {
        "first": runs[pair.first].name,
        "second": runs[pair.second].name,
        **{f"psnr_{name}": value for name, value in asdict(pair.apart).items()},
        "closer": pair.closer,
        "paired": pair.closer is not None,
        "one_model": runs[pair.first].source == runs[pair.second].source,
    }


def _rounded(pair: Pair) -> list[float]:
    return [round(value, 3) for value in (pair.apart.mean, pair.apart.low, pair.apart.high)]


def _against_best(
    runs: Sequence[Run], groups: Sequence[Sequence[Run]], pairs: Sequence[Pair]
) -> list[str]:
    """Say how each run compares with the closest one over the same model and prompts."""
    best = {run.name: group[0].name for group in groups for run in group}
    found = {(runs[p.first].name, runs[p.second].name): p.apart for p in pairs}
    said = []
    for run in runs:  # the closest of a group stands before the others
        apart = found.get((best[run.name], run.name))
        if apart is not None:
            said.append(f"{-apart.mean:+.2f} [{-apart.high:+.2f}, {-apart.low:+.2f}]")
        else:
            said.append("the closest" if best[run.name] == run.name else "")
    return said


def _chart(
    group: Sequence[Run], names: Mapping[str, str], numbers: Mapping[str, int], fronts: set[str]
) -> dict[str, Any]:
    best = front(group)
    dots = [
        Dot(
            f"{numbers[r.name]}. {names[r.name]}: {r.bits:.2f} bits, {r.psnr.mean:.2f} dB",
            r.bits,
            r.psnr.mean,
            "b" if r.name in fronts else "a",
            (r.psnr.low, r.psnr.high),
            str(numbers[r.name]),
        )
        for r in group
    ]
    line = Series("the front", [(r.bits, r.psnr.mean) for r in best], "b front")
    title = f"{group[0].model}, {len(group[0].prompts)} prompts"
    drawn = chart(
        f"PSNR by bits per parameter: {title}",
        Axis("bits per parameter"),
        Axis("PSNR, dB"),
        lines=[line] if len(best) > 1 else [],
        dots=dots,
    )
    ends = {"Closest": max(group, key=lambda r: r.psnr.mean), "Smallest": best[0]}
    said = [
        f"{word}: {numbers[r.name]}. {names[r.name]} ({r.psnr.mean:.2f} dB, {r.bits:.2f} bits)."
        for word, r in ends.items()
    ]
    return {"title": title, "said": " ".join(said), "svg": drawn}


def _cautions(runs: Sequence[Run]) -> list[str]:
    """Return what a reader has to know before comparing these runs."""
    found = []
    if len({run.source for run in runs}) > 1:
        found.append(
            "the runs are of several 16-bit models, or of one that is called differently: a PSNR "
            "of one model says nothing about another's"
        )
    if len({run.prompts for run in runs}) > 1:
        found.append("some runs have other prompts or seeds than others: these pairs are unpaired")
    if any(run.on_cpu for run in runs):
        found.append("times on the CPU's reference path say nothing about speed on a GPU")
    if len({run.device for run in runs}) > 1:
        found.append("times are of several devices")
    if len(runs) > MOST:
        found.append(f"any two of the first {MOST} of {len(runs)} runs can be tested")
    return found


def _csv(table: Sequence[Mapping[str, Any]]) -> str:
    """Return the table as CSV."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in table)
    return buffer.getvalue()


def _cell(value: Any) -> Any:
    """Quote text that a spreadsheet would take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in FORMULA else value
