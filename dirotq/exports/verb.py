"""``dirotq export``: a packed folder as one file that other programs read."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from dirotq.pipeline.disk import printable
from dirotq.progress import begin


def add_export(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `export`."""
    parser = add(
        _export, "write a packed model as one file for ComfyUI or diffusers",
        "FOLDER convrot_w4a4", "FOLDER svdquant_w4a4 --out models/flux-svdquant.safetensors",
    )  # fmt: skip
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a packed model")
    parser.add_argument(
        "format", metavar="FORMAT",
        help="convrot_w4a4, svdquant_w4a4, nvfp4 (diffusers, ModelOpt) or comfy_nvfp4",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="FILE",
        help="the file to write; default: FOLDER-FORMAT.safetensors here",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def _export(options: argparse.Namespace) -> int:
    """Write a packed model's transformer as one safetensors file with native key names.

    Codes and scales are copied, not rounded again. A format that can't say how the model is
    quantized is refused, and the methods that it can hold are named. docs/export.md has the
    formats, and what the programs need that read them.
    """
    started = time.monotonic()
    begin("loading torch and the model")
    # With torch, which takes seconds: not before the options are right.
    from dirotq.exports.export import export

    done = export(options.folder, options.format, out=options.out, overwrite=options.overwrite)
    layers = ", ".join(f"{count} layers as {name}" for name, count in done.layers.items())
    print(printable(
        f"{done.file}: {done.size / 1e6:.1f} MB; {layers}, {done.kept} tensors in 16 bits; "
        f"{time.monotonic() - started:.1f} s"
    ))  # fmt: skip
    return 0
