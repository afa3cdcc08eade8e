"""The levels are what their derivation gives; codes, packing and scales of LM4."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dirotq.kernels.formats.lm4 import (
    BETWEEN,
    CODES,
    LEVELS,
    UNITS,
    nearest_lm4,
    pack_lm4,
    unpack_lm4,
)
from dirotq.kernels.formats.quantize_weight import (
    codes_on_grid,
    dequantize_weight,
    weight_scales,
    weight_steps,
)

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


def test_either_container_holds_every_level_exactly() -> None:
    levels = torch.tensor(LEVELS)
    assert torch.equal(levels.to(torch.float8_e4m3fn).float(), levels)
    assert torch.equal((levels * UNITS).to(torch.int8), torch.tensor(CODES, dtype=torch.int8))
    assert torch.equal(torch.tensor(CODES) / UNITS, levels)


def test_rounding_is_a_search_over_all_levels() -> None:
    """Of two equally near the one closer to zero, of zero's the positive one."""
    v = torch.arange(-1800, 1801).double() / 16  # steps of a unit's sixteenth, beyond both ends
    v = torch.cat([v, torch.tensor([-0.0]).double()])
    values = [*CODES, *(-code for code in CODES)]
    found = nearest_lm4(v, torch.ones(1)).tolist()
    want = [min(values, key=lambda c: (abs(c - x), abs(c), -c)) for x in v.tolist()]
    assert found == want


def test_ties_and_both_sides_of_them() -> None:
    for middle, low, high in zip(BETWEEN, CODES, CODES[1:]):
        v = torch.tensor([middle, middle + 1e-4, -middle, -middle - 1e-4])
        assert nearest_lm4(v * 0.5, torch.tensor(0.5)).tolist() == [low, high, -low, -high]


def test_where_a_step_is_zero_every_value_is() -> None:
    codes = nearest_lm4(torch.tensor([[3.0, -2.0]]), torch.zeros(1, 1))
    assert codes.tolist() == [[CODES[0], CODES[0]]]
    assert not dequantize_weight(codes.to(torch.int8), torch.zeros(1, 1)).any()


def test_a_nibble_is_a_sign_and_a_rank() -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    codes = unpack_lm4(packed)
    assert torch.equal(pack_lm4(codes), packed)
    assert torch.equal(unpack_lm4(packed ^ 0x88), -codes)
    low, high = codes[..., 0::2].flatten().tolist(), codes[..., 1::2].flatten().tolist()
    for byte in range(256):
        for nibble, code in ((byte & 15, low[byte]), (byte >> 4, high[byte])):
            assert code / UNITS == (-1) ** (nibble >> 3) * LEVELS[nibble & 7]


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (torch.tensor([[4, 0]], dtype=torch.int8), "^0 is no code: those are"),
        (torch.tensor([[-5, 4]], dtype=torch.int8), "^-5 is no code"),
        (torch.tensor([[4, 97]], dtype=torch.int8), "^97 is no code"),
        (torch.tensor([[-128, 4]], dtype=torch.int8), "^-128 is no code"),
        (torch.tensor([[4, 13, 22]], dtype=torch.int8), "even last dim"),
        (torch.tensor([[4, 13]]), r"must be int8.*torch\.int64"),
    ],
)
def test_what_is_no_code_is_not_packed(codes: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack_lm4(codes)


@pytest.mark.parametrize(("groups", "gain"), [(1, 1.0), (16, 0.6)])
def test_normally_distributed_weights_gain_what_the_derivation_says(
    groups: int, gain: float
) -> None:
    w = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    lost = {}
    for element in ("int4", "lm4"):
        scale = weight_scales(w, groups, clip=True, element=element)
        step = weight_steps(scale, None, element)
        error = dequantize_weight(codes_on_grid(w, step, element), step) - w
        lost[element] = decibels(error.square().mean())
    assert lost["lm4"] > lost["int4"] + gain
    # 20.19 dB with one scale for all: a grid of few fractions finds most of it, groups more.
    assert lost["lm4"] > 20.0
