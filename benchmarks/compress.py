"""`make bench-compress`: all stages on a model of full size with generated weights.

    python benchmarks/compress.py flux --models /dev/shm --store artifacts --depth 0.25 OVERRIDES
    python benchmarks/compress.py flux executor.devices=[0,1]

`preset=instant` among the OVERRIDES leaves calibration out: every stage from the weights alone.

Prints one row per stage: seconds, peak VRAM and RAM and bytes on disk beside what was told of them.
Stages that are in the store already are listed with what they took. With several processes
(`executor.devices`, `executor.workers`) there are two runs, the first in one process, each in a
store of its own, and a table of both. `--way one` and `--way several` make one of them, `--way
table` none; `--generate` makes the model and no more. Figures are kept in --figures, stage by
stage; a run that was stopped goes on.
"""

import argparse
import json
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

# torch and what stands on it come after the workers have been started, as in `dirotq compress`.
from dirotq.benchmarks import compress_table
from dirotq.pipeline import dag, early, preflight
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.build import build
from dirotq.pipeline.compress import start_workers
from dirotq.pipeline.config import compose_config, groups
from dirotq.pipeline.quoting import quote

TINY = "tiny_flux"
"""The model that comes with DiRotQ, for a look at the benchmark itself."""
WAYS = ("one", "several")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=f"a name of full_size.COMPRESSED, or {TINY}")
    parser.add_argument("--models", type=Path, default=Path("artifacts/full-size"))
    parser.add_argument("--store", default="artifacts")
    parser.add_argument("--figures", type=Path, default=Path("artifacts/bench/compress"))
    parser.add_argument("--depth", type=float, default=1.0, help="share of the blocks")
    parser.add_argument("--until", default="pack")
    parser.add_argument("--generate", action="store_true", help="make the model, no more")
    parser.add_argument("--way", choices=("one", "several", "table"))
    parser.add_argument("overrides", nargs="*", help="e.g. capture.vram=24GB")
    options = parser.parse_intermixed_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `dirotq` does
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    shared = any(word.startswith("executor.") for word in options.overrides)
    if options.way or options.generate or not shared:
        if options.way != "table":
            with early.block():
                compress(options, shared and options.way == "several")
    else:
        for way in ("one", "several"):  # each in a process of its own, with memory of its own
            subprocess.run([sys.executable, *sys.argv, "--way", way], check=True)
    files = [_file(options, several) for several in (False, True)]
    if shared and not options.generate and all(file.exists() for file in files):
        print(f"\n{compress_table.beside(*(json.loads(file.read_text()) for file in files))}")


def compress(options: argparse.Namespace, several: bool) -> None:
    """Run the line once, in one process or as the overrides say; figures to the screen and a file.

    Without ``several``, what the overrides say of an executor is left out.
    """
    folder = options.models / f"{options.model}-{options.depth:g}"
    words = [w for w in options.overrides if several or not w.startswith("executor.")]
    way = " ".join(w for w in words if w.startswith("executor.")) or "one process"
    common = " ".join(w for w in words if not w.startswith("executor.")) or "defaults"
    store = f"{options.store}-several" if several else options.store
    told = [*chosen(options.model, folder), f"store={store}", f"until={options.until}"]
    cfg = compose_config([*told, *words], "dirotq.conf")
    start_workers(cfg)

    import torch

    from dirotq.benchmarks import full_size, packed_check
    from dirotq.device import pick_device

    device = pick_device("auto")
    if options.model != TINY:
        full_size.generated(options.model, options.models, options.depth, device)
    if options.generate:
        return
    line = build(cfg)
    found = preflight.examine(line, cfg)
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = {
        "order": [step.name for step in line.steps],
        "what": f"{options.model}, depth {options.depth:g}, {common}", "way": way,
        "machine": f"{chip}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{time.strftime('%Y-%m-%d')}",
    }  # fmt: skip
    figures = compress_table.Figures(_file(options, several), about)
    print(f"\n{about['what']}; {way}; {about['machine']}\n\n{compress_table.head()}", flush=True)
    waiting, began = list(line.steps), time.monotonic()
    artifacts: dict[str, Artifact] = {}

    def begin() -> None:
        if waiting:
            figures.begin(waiting[0].name, waiting[0].fingerprint)

    def finished(artifact: Artifact) -> None:
        nonlocal began
        waiting.pop(0)
        artifacts[artifact.stage] = artifact
        found = figures.end(artifact, time.monotonic() - began)
        print(compress_table.row(artifact.stage, found), flush=True)
        begin()
        began = time.monotonic()

    begin()
    estimates = found.records
    dag.run(line.steps, line.store, line.executor, estimates=estimates, finished=finished)
    print(f"| all | {sum(figures.stages[name]['seconds'] for name in artifacts):.4g} |" + " |" * 6)
    if {"pack", "capture"} <= artifacts.keys():
        print(packed_check.check(line.steps[0].stage.model, artifacts, device))


def _file(options: argparse.Namespace, several: bool) -> Path:
    return options.figures / f"{options.model}-{options.depth:g}-{WAYS[several]}.json"


def chosen(name: str, folder: Path) -> list[str]:
    """Return the overrides that choose a generated pipeline, with the defaults of the published one
    of its name, if conf/model has it.
    """
    if name == TINY:
        return [f"model={name}"]
    known = name in groups("dirotq.conf")["model"]
    return [f"model={name if known else 'local'}", f"model.path={quote(str(folder))}"]


if __name__ == "__main__":
    main()
