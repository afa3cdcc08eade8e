"""Time and memory of `dirotq export` at FLUX.1's shapes: `make bench-export ARGS=FORMAT`.

The packed folder is made with random codes in a temporary folder (7 GB, and as much for the file).
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from dirotq.benchmarks import contestants
from dirotq.files.sums import write_sums
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.settings import make

WORDS = {
    "convrot_w4a4": ["method=convrot", "weight_format=int4_channel", "act_format=int4_token"],
    "svdquant_w4a4": ["method=svdquant"],
    "nvfp4": ["method=rtn_nvfp4"],
    "comfy_nvfp4": ["method=rtn_nvfp4"],
}
EXPORT = """
import sys, time
from dirotq.cli import main
from dirotq.pipeline.provenance import provenance
try:
    main(sys.argv[1:])
finally:
    print("peak", provenance(time.time(), [])["peak_rss_bytes"] // 10**6, "MB")
"""
"""The process tells its peak itself: getrusage would tell the parent's, if that is larger."""


def main(format: str = "convrot_w4a4") -> None:
    """Print seconds and the peak of memory of an export, in a process of its own."""
    method = make(compose_config(WORDS[format], "dirotq.conf").method, "method")
    with tempfile.TemporaryDirectory(prefix="export-") as scratch:
        folder = Path(scratch) / "flux"
        with mock.patch.object(contestants, "method", lambda preset: method):
            transformer = contestants.random_packed("flux", "cpu")
        transformer.save_pretrained(folder / "transformer", max_shard_size="2GB")
        del transformer
        (folder / "model_index.json").write_text(
            json.dumps({
                "_class_name": "FluxPipeline",
                "transformer": ["diffusers", "FluxTransformer2DModel"],
            })
        )  # fmt: skip
        write_sums(folder)
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", EXPORT, "export", str(folder), format,
             "--out", str(Path(scratch) / "flux.safetensors")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        told = re.sub(r"^.*/", "", done.stdout.strip())
        print(f"{format}: {time.monotonic() - begin:.1f} s in all; {told}")


if __name__ == "__main__":
    main(*sys.argv[1:])
