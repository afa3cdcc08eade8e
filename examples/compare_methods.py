"""Compare methods on one model. Calibration and the 16-bit images are made once, for all of them.

usage: python examples/compare_methods.py [MODEL] [OVERRIDES ...]
"""

import sys

import dirotq

METHODS = ("dirotq", "svdquant", "rtn")


def main(model: str = "tiny_flux", *overrides: str) -> None:
    for method in METHODS:
        made = dirotq.compress(model, *overrides, method=method, rank=16)
        psnr, bits = made.scores["psnr"], made.scores["bits_per_parameter"]
        print(f"{method:<9} PSNR {psnr:5.1f} dB at {bits:.2f} bits per parameter")


if __name__ == "__main__":
    main(*sys.argv[1:])
