"""`make bench-quality`: every method through all stages on the embedded models.

usage: python benchmarks/quality.py [--models tiny_flux] [--sections methods] [--rows svdquant]
                                    [--prompts 512] [--jobs 1] [--out docs/quality] [overrides...]

Writes OUT/<model>.json: per row every score of every image (benchmarks/quality_rows.py has the
rows). `make table` turns what is stored into docs/quality.md. All rows take minutes on one H200
(--jobs 14 device=cuda reference.batch=128 validate.batch=128) and days on a CPU: there, choose rows
and fewer captions (--rows dirotq rtn --prompts 32 --out DIR). Stored rows that are defined
otherwise by now are dropped.
"""

import argparse
import datetime
import json
import multiprocessing
import platform
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from dirotq.benchmarks.quality_rows import EXPERIMENT, MODELS, SECTIONS, Row, current, rows

DIGITS = {"psnr": 3, "ssim": 6, "ms_ssim": 6, "captioned": 4}
"""Decimals kept of each score per image."""

LONG = ("rank=budget", "method.sensitive=auto", "capture.calls=", "prompts.", "method=svdquant")
"""How overrides begin of rows that take longest: an A/B of sites, or a calibration of their own.
They are begun first, so that none is left alone at the end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rows", nargs="*", help="only these, by key")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the device")
    parser.add_argument("--minutes", type=float, help="start no row after so many")
    parser.add_argument("--out", type=Path, default=Path("docs/quality"))
    options, overrides = parser.parse_known_args()
    chosen = chosen_rows(options.sections, options.rows)
    for model in options.models:
        refuse_other_count(options.out / f"{model}.json", options.prompts)
    common = [EXPERIMENT, f"prompts.heldout.count={options.prompts}", *overrides]
    jobs = [(row, model) for row in chosen for model in options.models]
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    # Each process brings its own CUDA context; the store keeps them from doing one thing twice.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        made = {
            pool.submit(measured, row, [f"model={model}", *common], deadline): (row, model)
            for row, model in jobs
        }
        for future in as_completed(made):
            row, model = made[future]
            result = future.result()
            if "error" in result:
                print(f"{model} {row.key}: {result['error']}", flush=True)
                continue
            store(options.out / f"{model}.json", row.key, result)
            numbers = result["metrics"]
            shown = {k: round(numbers[k], 4) for k in ("psnr", "attributes", "bits_per_parameter")}
            print(f"{model} {row.key}: {shown}, {result['seconds']:.0f} s", flush=True)


def chosen_rows(sections: Sequence[str], keys: Sequence[str] | None) -> list[Row]:
    """Return the rows of ``sections``, or those of ``keys`` among them, the longest first.

    Leaves where a key is no row's.
    """
    found = rows(tuple(sections))
    if unknown := set(keys or ()) - {row.key for row in found}:
        raise SystemExit(
            f"--rows {' '.join(sorted(unknown))}: no such rows in {', '.join(sections)}; there are "
            + ", ".join(row.key for row in found)
        )
    chosen = [row for row in found if not keys or row.key in keys]
    return sorted(chosen, key=lambda row: not any(word.startswith(LONG) for word in row.overrides))


def measured(row: Row, common: list[str], deadline: float | None) -> dict[str, Any]:
    """Run all stages for a row; what went wrong stands under ``error``, other rows go on."""
    import dirotq

    if deadline is not None and time.monotonic() > deadline:
        return {"error": "not started: out of time"}
    began = time.perf_counter()
    try:
        made = dirotq.compress(*common, *row.overrides).artifacts
    except Exception as error:  # noqa: BLE001 (a row that fails must not cost the others)
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    report = json.loads(made["validate"].file("report.json").read_text())
    return summary(report, made.get("rank", made["validate"]).metrics) | {
        "overrides": list(row.overrides),
        "seconds": round(time.perf_counter() - began, 1),
    }


def summary(report: dict[str, Any], plan: dict[str, float]) -> dict[str, Any]:
    """Keep of a report: headline, plan metrics, and the scores of each image."""
    import torch

    images = report["images"]
    kinds = [kind for kind in DIGITS if kind in images[0]]

    def column(kind: str, among: str | None = None) -> list[float]:
        chosen = [image if among is None else image[among] for image in images]
        return [round(image[kind], DIGITS[kind]) for image in chosen]

    floor = {k: column(k, "floor") for k in kinds} if "floor" in images[0] else None
    original = {"captioned": column("captioned", "original")} if "captioned" in kinds else None
    return {
        "metrics": report["metrics"],
        "plan": plan,
        "images": {kind: column(kind) for kind in kinds},
        "floor": floor,
        "original": original,
        "dtype": report["dtype"],
        "device": report["device"],
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "date": str(datetime.datetime.now(datetime.UTC).date()),
    }


def refuse_other_count(file: Path, prompts: int) -> None:
    """Leave if ``file`` holds rows of another number of captions: they could not be compared."""
    stored = json.loads(file.read_text())["rows"].values() if file.is_file() else ()
    counts = {len(row["images"]["psnr"]) for row in stored}
    if counts - {prompts}:
        raise SystemExit(
            f"{file} holds rows of {max(counts)} captions, these would have {prompts}: name "
            "another folder (--out DIR), or the same number (--prompts)"
        )


def store(file: Path, key: str, result: dict[str, Any]) -> None:
    """Add one row to a model's results, and drop those that are defined otherwise by now.

    Floor and 16-bit scores, alike for all rows, stand once.
    """
    stored = json.loads(file.read_text()) if file.is_file() else {"baselines": {}, "rows": {}}
    shared = {name: result.pop(name) for name in ("floor", "original")}
    stored["baselines"][result["dtype"]] = shared | {
        name: value
        for name, value in result["metrics"].items()
        if name.endswith(("_floor", "_original"))
    }
    stored["rows"] = current(stored["rows"] | {key: result})
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(stored, separators=(",", ":"))
    file.write_text(text.replace('},"', '},\n"') + "\n")  # a line per row: diffs stay readable


if __name__ == "__main__":
    main()
