"""Compress a pipeline that is in memory: one that was changed in Python, or put together there.

usage: python examples/compress_a_pipeline.py [FOLDER] [OVERRIDES ...]
"""

import sys
from importlib.resources import files

import torch
from diffusers import DiffusionPipeline

import dirotq

TINY_FLUX = str(files("dirotq.assets") / "tiny-flux")
CALL = {"num_inference_steps": 4, "height": 32, "width": 32, "max_sequence_length": 8}
"""How calibration and scores call it: a pipeline in memory does not say."""


def main(folder: str = TINY_FLUX, *overrides: str) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in pipe.transformer.proj_out.parameters():
            parameter.mul_(0.5)
    call = [f"+model.call.{name}={value}" for name, value in CALL.items()]
    made = dirotq.compress(pipe, *call, *overrides, rank=16)
    print(f"{made.folder}: {made.scores['bits_per_parameter']:.2f} bits per parameter")


if __name__ == "__main__":
    main(*sys.argv[1:])
