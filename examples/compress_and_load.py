"""Compress a model, look at its scores, and make an image with what came out.

usage: python examples/compress_and_load.py [MODEL] [OVERRIDES ...]
"""

import json
import sys

import dirotq


def main(model: str = "tiny_flux", *overrides: str) -> None:
    made = dirotq.compress(model, *overrides, method="dirotq", rank=16)
    assert made.folder is not None
    print(f"{made.folder}: PSNR {made.scores['psnr']:.1f} dB; {made.report}")

    pipe = dirotq.load(made.folder)
    call = json.loads((made.folder / "generation.json").read_text())  # steps, size, guidance
    pipe("a small red star in the center", **call).images[0].save("star.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
