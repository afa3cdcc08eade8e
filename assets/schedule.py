"""Training for a given time instead of a given number of steps."""

import math
import time
from collections.abc import Iterator

import torch


def timed_steps(seconds: float) -> Iterator[tuple[int, float]]:
    """Count steps until `seconds` have passed: yields (step, fraction of the time used)."""
    start = time.perf_counter()
    step = 0
    while (elapsed := time.perf_counter() - start) < seconds:
        yield step, elapsed / seconds
        step += 1


def set_rate(
    optimizer: torch.optim.Optimizer, peak: float, step: int, fraction: float, warmup: int
) -> None:
    """Cosine learning rate from `peak` to 2 % of it over the time, after `warmup` steps."""
    cosine = 0.51 + 0.49 * math.cos(math.pi * fraction)
    for group in optimizer.param_groups:
        group["lr"] = peak * cosine * min(1.0, (step + 1) / warmup)
