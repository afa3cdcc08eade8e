"""`make table`: docs/quality.md from the stored results of `make bench-quality`.

usage: python benchmarks/quality_table.py [--results docs/quality] [--into docs/quality.md]
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dirotq.benchmarks.published import put
from dirotq.benchmarks.quality_rows import (
    ABLATIONS,
    ALLOCATION,
    ENCODERS,
    FORMATS,
    METHODS,
    MODELS,
    RUNTIME,
    Row,
    current,
    rows,
)
from dirotq.evaluate.statistics import Interval, difference_interval

OTHER = 20.0
"""dB below which a packed model has drawn another image than the 16-bit one."""
Results = Mapping[str, Any]
"""One model's file: ``baselines`` by dtype and ``rows`` by key."""


@dataclass(frozen=True, slots=True)
class Claim:
    """``row`` against ``base`` in mean PSNR: at least ``reach`` dB per model."""

    text: str
    row: str
    base: str
    reach: Mapping[str, float]


CLAIMS = (
    Claim("the default over svdquant g64/g64", "default", "svdquant",
          {"tiny_flux": 3.5, "tiny_pixart": 2.0}),
    Claim("the default over dirotq g64/g64 of integers", "default", "dirotq_g64",
          {"tiny_flux": 0.0, "tiny_pixart": 0.0}),
    Claim("dirotq g64/g64 over svdquant g64/g64, equal bits", "dirotq_g64", "svdquant",
          {"tiny_flux": 2.5, "tiny_pixart": 1.5}),
    Claim("dirotq over svdquant with Hadamard, both rms/levels", "dirotq", "svdquant_alike",
          {"tiny_flux": 0.0, "tiny_pixart": 0.0}),
    Claim("dirotq over dirotq_dense, both rms/levels", "dirotq", "dense",
          {"tiny_flux": -0.1, "tiny_pixart": -0.1}),
    Claim("levels over integers, equal bits", "dirotq", "integers",
          {"tiny_flux": 0.15, "tiny_pixart": 0.15}),
    Claim("8 bits where they matter over none", "default", "dirotq",
          {"tiny_flux": 0.15, "tiny_pixart": 0.15}),
    Claim("rms over lzs, the rounding of QuaRTZ", "dirotq", "lzs",
          {"tiny_flux": 0.0, "tiny_pixart": 0.0}),
    Claim("budget over uniform r = 16, equal bits", "budget", "dirotq",
          {"tiny_flux": 0.0, "tiny_pixart": 0.0}),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("docs/quality"))
    parser.add_argument("--into", type=Path, default=Path("docs/quality.md"))
    options = parser.parse_args()
    files = {model: options.results / f"{model}.json" for model in MODELS}
    found = {model: read(file) for model, file in files.items() if file.is_file()}
    if not found:
        raise SystemExit(f"no results under {options.results}: run `make bench-quality` first")
    for name, text in tables(found).items():
        put(options.into, name, text)


def read(file: Path) -> Results:
    """Read one model's results.

    Leaves where a row was measured as it is not defined any more: the table would say of it what
    it is not.
    """
    results: Results = json.loads(file.read_text())
    if stale := results["rows"].keys() - current(results["rows"]).keys():
        raise SystemExit(
            f"{file}: rows {', '.join(sorted(stale))} are not defined so in quality_rows.py any "
            "more: measure a row again (make bench-quality), which drops these"
        )
    return results


def tables(found: Mapping[str, Results]) -> dict[str, str]:
    """{name of the block in the document: markdown}."""
    made = {f"methods {model}": methods(results) for model, results in found.items()}
    made["formats"] = compared(FORMATS, found)
    made["runtime"] = compared(RUNTIME, found, own_floor=True)
    made["allocation"] = compared(ALLOCATION, found)
    made["ablations"] = compared(ABLATIONS, found)
    made["encoders"] = compared(ENCODERS, found)
    made["claims"] = claims(found)
    made["provenance"] = provenance(found)
    return made


def methods(results: Results) -> str:
    """Every metric of every method, and the difference to the rival, image by image."""
    lines = [
        "| method (activations/weights) | PSNR, dB | vs svdquant g64, 95 % | median | other images "
        "| SSIM | MS-SSIM | FID | KID x 1000 | attributes | bits |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in METHODS:
        if row.key in results["rows"]:
            m = results["rows"][row.key]["metrics"]
            psnr = results["rows"][row.key]["images"]["psnr"]
            lines.append(
                f"| {row.text} | {m['psnr']:.2f} | {gain(results, row.key, row.base)} "
                f"| {median(psnr):.2f} | {sum(value < OTHER for value in psnr)} "
                f"| {m['ssim']:.4f} | {m['ms_ssim']:.5f} | {m['fid']:.4f} | {1000 * m['kid']:.3f} "
                f"| {m['attributes']:.2%} | {m['bits_per_parameter']:.2f} |"
            )
    base = results["baselines"].get("float32")
    if base:
        lines.append(
            f"| 16 bit, other batch and kernel (noise floor) | {base['psnr_floor']:.1f} | | | 0 "
            f"| {base['ssim_floor']:.4f} | {base['ms_ssim_floor']:.5f} | {base['fid_floor']:.4f} "
            f"| {1000 * base['kid_floor']:.3f} | {base['attributes_floor']:.2%} | 16 |"
        )
        lines.append(f"| 16 bit | | | | | | | | | {base['attributes_original']:.2%} | 16 |")
    return "\n".join(lines) + "\n"


def compared(
    section: tuple[Row, ...], found: Mapping[str, Results], *, own_floor: bool = False
) -> str:
    """Write PSNR, difference and bits of a section's rows, the models side by side.

    own_floor  in place of the difference, the noise floor of the row's precision
    """
    names = {row.key: row.text for row in rows()}
    title = "16 bit against itself" if own_floor else "difference, 95 %"
    head = "".join(f" {m}: PSNR | {title} | bits |" for m in found)
    lines = [f"| | compared with |{head}", "|---|---|" + "---|---|---|" * len(found)]
    for row in section:
        cells = []
        for results in found.values():
            if row.key not in results["rows"]:
                cells.append(" | | |")
                continue
            m = results["rows"][row.key]["metrics"]
            beside = gain(results, row.key, row.base)
            if own_floor:
                base = results["baselines"][results["rows"][row.key]["dtype"]]
                beside = f"floor {base['psnr_floor']:.2f}"
            cells.append(f" {m['psnr']:.2f} | {beside} | {m['bits_per_parameter']:.2f} |")
        if any(cell.strip(" |") for cell in cells):
            lines.append(f"| {row.text} | {names[row.base].strip('*')} |{''.join(cells)}")
    return "\n".join(lines) + "\n"


def claims(found: Mapping[str, Results]) -> str:
    """Each claim with what it wants and what was measured."""
    lines = ["| claim | model | reach, dB | measured, 95 % | |", "|---|---|---|---|---|"]
    for claim in CLAIMS:
        for model, results in found.items():
            if not {claim.row, claim.base} <= results["rows"].keys():
                continue
            apart = interval(results, claim.row, claim.base)
            reach = claim.reach[model]
            # A gain has to stand clear of zero, a loss allowed for only has to be small enough.
            sure = apart.low > 0 if reach >= 0 else True
            verdict = "reached" if apart.mean >= reach and sure else "missed"
            lines.append(f"| {claim.text} | {model} | {reach:+g} | {shown(apart)} | {verdict} |")
    return "\n".join(lines) + "\n"


def provenance(found: Mapping[str, Results]) -> str:
    """Where the stored rows were made."""
    lines = ["| model | held-out captions | rows | GPU | torch | dates |", "|---" * 6 + "|"]
    for model, results in found.items():
        stored = results["rows"].values()
        count = len(next(iter(stored))["images"]["psnr"])
        dates = sorted({row["date"] for row in stored})
        devices = ", ".join(sorted({row["device"] for row in stored}))
        versions = ", ".join(sorted({row["versions"]["torch"] for row in stored}))
        days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        lines.append(f"| {model} | {count} | {len(stored)} | {devices} | {versions} | {days} |")
    return "\n".join(lines) + "\n"


def interval(results: Results, key: str, base: str) -> Interval:
    """Paired difference in PSNR, 95 %."""
    ours, theirs = (results["rows"][k]["images"]["psnr"] for k in (key, base))
    return difference_interval(ours, theirs)


def gain(results: Results, key: str, base: str) -> str:
    if key == base or base not in results["rows"]:
        return ""
    if results["rows"][key]["dtype"] != results["rows"][base]["dtype"]:
        return "other precision"
    return shown(interval(results, key, base))


def shown(apart: Interval) -> str:
    return f"{apart.mean:+.2f} [{apart.low:+.2f}, {apart.high:+.2f}]"


if __name__ == "__main__":
    main()
