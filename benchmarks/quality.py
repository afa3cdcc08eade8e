"""`make bench-quality`: every method through the whole line on tiny-flux, as a table.

usage: python benchmarks/quality.py [--prompts 64] [--into docs/quality.md] [overrides...]

With --into, the table replaces what stands between the two markers of that file.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import dirotq

BEGIN, END = "<!-- begin: make bench-quality -->", "<!-- end -->"
G64 = ["method.weight_scale=group", "method.weight_clip=false", "method.act_scale=group"]
ROWS: dict[str, list[str]] = {
    "rtn, g64/g64": ["method=rtn"],
    "dirotq, pow2/channel (default)": ["method=dirotq"],
    "dirotq_dense, pow2/channel": ["method=dirotq_dense"],
    "dirotq, g64/g64": ["method=dirotq", *G64],
    "dirotq_dense, g64/g64": ["method=dirotq_dense", *G64],
    "dirotq, token/channel": ["method=dirotq", "method.act_scale=token"],
    "dirotq W4A8, token/channel": ["method=dirotq_w4a8"],
    "rtn NVFP4": ["method=rtn_nvfp4"],
    "dirotq NVFP4": ["method=dirotq_nvfp4"],
    "rtn MXFP4": ["method=rtn_mxfp4"],
    "dirotq MXFP4": ["method=dirotq_mxfp4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--into", type=Path, default=Path("docs/quality.md"))
    options, overrides = parser.parse_known_args()
    common = ["experiment=quality", f"prompts.heldout.count={options.prompts}", *overrides]
    reports = {}
    for name, row in ROWS.items():
        artifact = dirotq.compress(*common, *row)["validate"]
        reports[name] = json.loads(artifact.file("report.json").read_text())
        print(name, reports[name]["metrics"], flush=True)
    put(options.into, table(reports))


def put(document: Path, text: str) -> None:
    """Replace what stands between the markers of a document."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    document.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: one row per method, PSNR with the paired difference to round-to-nearest."""
    first = next(iter(reports.values()))
    lines = [
        "| method (activations/weights) | PSNR, dB | vs rtn, 95 % | SSIM | attributes | bits |",
        "|---|---|---|---|---|---|",
    ]
    for name, report in reports.items():
        m = report["metrics"]
        lines.append(
            f"| {name} | {m['psnr']:.2f} | {_gain(report, first)} | {m['ssim']:.4f} "
            f"| {m['attributes']:.2%} | {m['bits_per_parameter']:.2f} |"
        )
    original = first["metrics"]["attributes_original"]
    today = datetime.datetime.now(datetime.UTC).date()
    lines += [
        f"| 16 bit | | | | {original:.2%} | 16 |",
        "",
        f"{len(first['images'])} held-out captions, 20 steps, against the 16-bit images of the "
        f"same noise. {first['device']}; torch {torch.__version__}, "
        f"Python {platform.python_version()}; {today}.",
    ]
    return "\n".join(lines) + "\n"


def _gain(report: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Mean paired PSNR difference, 95 % bootstrap interval (10,000 resamples, seeded)."""
    pairs = zip(report["images"], base["images"], strict=True)
    gain = torch.tensor([a["psnr"] - b["psnr"] for a, b in pairs])
    if not gain.any():
        return ""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(gain), (10_000, len(gain)), generator=generator)
    low, high = gain[picks].mean(1).quantile(torch.tensor([0.025, 0.975])).tolist()
    return f"{gain.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    main()
