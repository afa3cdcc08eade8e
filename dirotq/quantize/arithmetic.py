"""How often the line itself runs a model, how many FLOPs that is, and what makes it less.

A forward is of one prompt and one branch of guidance. FLOPs are those of linears and attention
(:attr:`Workload.forward_flops`), whatever precision they are computed in.
"""

from collections.abc import Mapping
from typing import Any

from dirotq.models.call import PROBES
from dirotq.pipeline.machine import Forwards

MUCH = 1e18
"""FLOPs of a run from which the settings are named that lower it: half an hour of an H200, which
computes a compiled 16-bit forward of Wan at 0.59e15 FLOPs a second (docs/speed.md). What people
wait for without asking stays below: FLUX.1's defaults are a fifth of it."""
GRADIENTS = 10
"""Forwards that one call's errors of all sites take: one, one with graphs, eight directions back
(dirotq/quantize/measure.py)."""
VIDEO = (
    "prompts=video capture=video reference=video validate=video ++model.sample.height=480 "
    "++model.sample.width=832 ++model.sample.num_frames=25"
)
"""What conf/model/video.yaml says, as overrides."""
FEWER = (
    "fewer prompts (prompts.calibration.count, prompts.heldout.count), fewer steps or smaller "
    "images in these runs alone (++model.sample.num_inference_steps, ++model.sample.height, "
    "++model.sample.width), and capture.calls, capture.batch=1"
)


def generating(work: Any, prompts: int) -> Forwards:
    """Of all steps for so many prompts."""
    count = prompts * work.steps * work.guided
    return count, count * work.forward_flops


def replaying(work: Any) -> Forwards:
    """Of the recorded calls, with a triangle of the second moment of each site's input."""
    moments = sum(work.tokens(site) * site.in_features**2 for site in work.sites)
    each = work.forward_flops + moments / len(work.model.parts)
    return work.recorded, work.recorded * each


def measuring(work: Any) -> Forwards:
    """Of what a measurement of all sites' errors takes, on each denoiser's probes."""
    count = GRADIENTS * PROBES * len(work.model.parts) * work.samples
    return count, count * work.forward_flops


def proving(work: Any) -> Forwards:
    """Of a probe's passes through each denoiser and through what it was fused to."""
    count = 2 * len(work.model.parts) * work.samples
    return count, count * work.forward_flops


def told(work: Any, forwards: Mapping[str, Forwards]) -> list[str]:
    """Say the forwards of the stages that would run, by what they are for; nothing of none.

    From MUCH on, a second sentence names the settings that lower them.
    """
    if not forwards:
        return []
    each = (f"{what} {n:,} ({_peta(flops)})" for what, (n, flops) in forwards.items())
    height, width, frames = work.size
    size = f"{height} x {width}" + f" x {frames} frames" * (frames > 1)
    total = sum(flops for _, flops in forwards.values())
    said = (
        f"forwards of the line's own runs, at {size}, {work.image_tokens:,} tokens each: "
        f"{', '.join(each)}; together {_peta(total)}"
    )
    return [said, *([advice(work, total)] if total >= MUCH else [])]


def advice(work: Any, flops: float) -> str:
    """Say that so many FLOPs are many, and which settings lower them."""
    video = f"{VIDEO}, or single ones: " if work.size[2] > 1 else ""
    return (
        f"the line's own runs are {_peta(flops)}, and an H200 takes about half an hour for "
        f"{_peta(MUCH)}. Less of it: {video}{FEWER}. model.sample changes nothing in how the "
        "packed model is called"
    )


def _peta(flops: float) -> str:
    count = flops / 1e15
    return f"{count:,.0f} PFLOP" if count >= 10 else f"{count:.2g} PFLOP"
