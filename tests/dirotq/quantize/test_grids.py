import pytest
import torch
from tiny_spec import FP4, tiny_spec

from dirotq.errors import ConfigError
from dirotq.kernels.formats.quantize_weight import weight_steps
from dirotq.quantize.grids import APART, by_row, neighbours
from dirotq.quantize.nearest import Rounded, nearest


def rounded(bias: float = 0.0, **changes) -> tuple[Rounded, object]:
    spec = tiny_spec(**changes)
    w = torch.randn(spec.outputs, spec.width, generator=torch.Generator().manual_seed(0))
    biases = torch.zeros(spec.outputs)
    biases[3] = bias
    return nearest(w, spec, clip=True, wp_NR=None, bias_N=biases), spec


@pytest.mark.parametrize("weight_scale", ["channel", "group", "lm4_channel", "lm4_group"])
def test_scales_lie_around_that_of_the_search(weight_scale):
    found, spec = rounded(weight_scale=weight_scale)
    grids = neighbours(found, spec, 5)
    assert grids[0] is found
    factors = sorted(float((g.wscale.float() / found.wscale.float()).mean()) for g in grids)
    want = [1 + i * APART for i in range(-2, 3)]
    assert factors == pytest.approx(want, abs=2e-3)
    for grid in grids:
        assert grid.wscale.dtype == torch.bfloat16
        assert torch.equal(grid.step, weight_steps(grid.wscale, None, spec.weights.element))


def test_no_scale_falls_below_the_floor():
    found, spec = rounded(bias=5000.0)
    assert found.floor is not None and found.wscale[3] == found.floor[3]
    for grid in neighbours(found, spec, 3)[1:]:
        assert (grid.wscale >= found.floor).all()
        assert not torch.equal(grid.wscale, found.wscale)


@pytest.mark.parametrize("name", FP4)
def test_bytes_are_refused(name):
    found, spec = rounded(**FP4[name])
    assert neighbours(found, spec, 1) == [found]
    with pytest.raises(ConfigError, match=rf"gptq\.scales=3: scales of {name} are bytes.*lm4_ch"):
        neighbours(found, spec, 3)


@pytest.mark.parametrize("weight_scale", ["channel", "group"])
def test_rows_take_their_own_grid(weight_scale):
    found, spec = rounded(weight_scale=weight_scale)
    grids = neighbours(found, spec, 3)
    taken = torch.arange(spec.outputs) % 3
    codes = torch.ones_like(found.codes)
    mixed = by_row(grids, taken, codes)
    assert mixed.codes is codes
    for row, i in enumerate(taken.tolist()):
        assert torch.equal(mixed.wscale[row], grids[i].wscale[row])
        assert torch.equal(mixed.step[row], grids[i].step[row])
    alone = by_row(grids[:1], torch.zeros_like(taken), codes)
    assert alone.wscale is found.wscale and alone.codes is codes
