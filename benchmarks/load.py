"""`make bench-load`: what holding a packed folder against its SHA256SUMS adds to `dirotq.load`.

A folder of random bytes with FLUX.1-dev's sizes, in shards as `pack` writes them, is made in the
temporary folder and removed again: ARGS="--gb 2 --shard 1GB --scratch FOLDER" makes another one.
Cold means that the files were dropped from the page cache before (Linux).
"""

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dirotq.files.digest import file_digest
from dirotq.files.sums import check_sums, write_sums
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.sizes import parse_bytes

BLOCK = 16 << 20
FOLDER = 16.6e9
"""Bytes of FLUX.1-dev's whole packed folder: T5-XXL in 16 bits is larger than the transformer."""
LARGEST = 5e9
"""Bytes of its largest file, a shard of T5-XXL: one file is one thread's work."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=6.6, help="of transformer (default: 6.6)")
    parser.add_argument("--shard", default=compose_config([], "dirotq.conf").pack.shard)
    parser.add_argument("--scratch", type=Path, help="where to make it (default: the system's)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        folder = Path(scratch) / "made"
        files = make(folder, int(options.gb * 1e9), parse_bytes(options.shard, "--shard"))
        print(
            f"{options.gb:g} GB in {len(files)} shards of at most {options.shard}, "
            f"{os.cpu_count()} CPUs\n\n| threads | GB/s, warm |\n|---|---|"
        )
        rates = {}
        for threads in sorted({1, 2, 4, 8, os.cpu_count() or 1}):
            folder = moved(folder)
            work = functools.partial(hash_all, folder, threads)
            rates[threads] = options.gb / seconds(work)
            print(f"| {threads} | {rates[threads]:.2f} |", flush=True)
        print("\n| `dirotq.load` adds | seconds |\n|---|---|")
        folder = moved(folder)
        check = functools.partial(check_sums, folder)
        print(f"| {options.gb:g} GB, warm | {seconds(check):.2f} |")
        print(f"| the same, again in this process | {seconds(check):.2f} |", flush=True)
        folder = moved(folder)
        drop(folder)
        check = functools.partial(check_sums, folder)
        print(f"| {options.gb:g} GB, cold | {seconds(check):.2f} |")
        whole = max(LARGEST / rates[1], FOLDER / max(rates.values())) / 1e9
        print(f"| FLUX.1-dev's folder, {FOLDER / 1e9:.1f} GB, warm, computed | {whole:.2f} |")


def make(folder: Path, size: int, shard: int) -> list[Path]:
    """Write a folder in the shape of a packed one, its transformer of ``size`` random bytes."""
    (folder / "transformer").mkdir(parents=True)
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    block = os.urandom(BLOCK)
    files = []
    for start in range(0, size, shard):
        file = folder / "transformer" / f"part-{len(files)}.safetensors"
        with file.open("wb") as f:
            left = min(shard, size - start)
            while left:
                left -= f.write(block[:left])
            f.flush()
            os.fsync(f.fileno())
        files.append(file)
    write_sums(folder)
    return files


def moved(folder: Path) -> Path:
    """Move the folder: digests are remembered by path."""
    return folder.rename(folder.with_name(f"{folder.name}-"))


def hash_all(folder: Path, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(file_digest, sorted(folder.glob("transformer/*"))))


def drop(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
