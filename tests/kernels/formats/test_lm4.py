"""The levels are what their derivation gives."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dirotq.kernels.formats.lm4 import LEVELS, UNITS

EXACT = [
    step for step in range(1, 128) if float(torch.tensor(step).to(torch.float8_e4m3fn)) == step
]
"""Numbers that 8-bit integers and E4M3 both hold."""


def gaussian_error(levels_CL: Tensor) -> Tensor:
    """Return the mean squared error of N(0, 1) rounded to the nearest of ± levels, [C]."""
    middle = (levels_CL[:, 1:] + levels_CL[:, :-1]) / 2
    low = torch.cat([torch.zeros_like(levels_CL[:, :1]), middle], 1)
    high = torch.cat([middle, torch.full_like(levels_CL[:, :1], 40)], 1)
    mass = torch.special.ndtr(high) - torch.special.ndtr(low)
    first = density(low) - density(high)
    second = mass + low * density(low) - high * density(high)
    return 2 * (second - 2 * levels_CL * first + levels_CL**2 * mass).sum(1)


def density(x: Tensor) -> Tensor:
    return torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def at_best_scale(levels_CL: Tensor) -> Tensor:
    """Return the least error over scales, [C]: the clip search of a Gaussian."""
    largest = torch.linspace(2.2, 3.4, 241, dtype=torch.float64)
    errors = [gaussian_error(levels_CL * top / levels_CL[:, -1:]) for top in largest]
    return torch.stack(errors).amin(0)


def lloyd_max() -> Tensor:
    """Return the 8 magnitudes of the 16-level quantizer of N(0, 1): each the mean of its cell."""
    levels = torch.linspace(0.1, 2.7, 8, dtype=torch.float64)
    for _ in range(2000):
        middle = (levels[1:] + levels[:-1]) / 2
        low = torch.cat([middle.new_zeros(1), middle])
        high = torch.cat([middle, middle.new_full((1,), 40)])
        mass = torch.special.ndtr(high) - torch.special.ndtr(low)
        levels = (density(low) - density(high)) / mass
    return levels


def decibels(error: Tensor) -> float:
    return -10 * math.log10(float(error))


def test_the_levels_are_the_best_exact_neighbours_of_the_lloyd_max_quantizer() -> None:
    ideal = lloyd_max()
    assert ideal.tolist() == pytest.approx(
        [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0691, 2.7326], abs=2e-4
    )
    found = []
    for top in (step for step in EXACT if step >= 64):  # below, half of it: the same numbers
        beside = []
        for want in (ideal[:-1] * top / ideal[-1]).tolist():
            above = next(i for i, step in enumerate(EXACT) if step > want)
            beside.append(EXACT[above - 1 : above + 1])
        found += [(*below, top) for below in itertools.product(*beside)]
    candidates = torch.tensor(found, dtype=torch.float64)
    errors = at_best_scale(candidates)
    assert (candidates[errors.argmin()] / UNITS).tolist() == list(LEVELS)
    assert decibels(errors.min()) == pytest.approx(20.19, abs=0.005)
    assert decibels(gaussian_error(ideal[None])) == pytest.approx(20.22, abs=0.005)
