import pytest
import torch
from torch import nn

from dirotq.kernels import weight_only
from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.formats.quantize_weight import (
    codes_on_grid,
    dequantize_weight,
    unpack_weight,
    weight_scales,
)
from dirotq.kernels.weight_only import (
    WeightOnlyEmbedding,
    WeightOnlyLinear,
    rounded,
    takes,
    takes_embedding,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def packed(like: nn.Linear, bits: int) -> WeightOnlyLinear:
    made = WeightOnlyLinear(like, bits)
    codes, scale = rounded(like.weight.data, bits)
    made.weight.data, made.scale.data = codes, scale
    if like.bias is not None:
        made.bias.data.copy_(like.bias.data)
    return made


def values(made: WeightOnlyLinear) -> torch.Tensor:
    """The weights that its codes stand for."""
    if made.bits == 8:
        return made.weight.float() * made.scale.float()
    element = made.spec.weights.element
    codes = unpack_weight(made.weight.view(torch.uint8), made.scale, element=element)
    return dequantize_weight(*codes)


def linear(bias=True, width=96) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(width, 40, bias=bias)


@pytest.mark.parametrize("bits, least, most", [(8, 40, 50), (4, 18, 24)])
def test_weights_lose_what_their_bits_say(bits, least, most):
    like = linear()
    lost = values(packed(like, bits)) - like.weight
    decibels = 10 * (like.weight.square().sum() / lost.square().sum()).log10()
    assert least < decibels < most


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_computes_what_its_codes_say(bits, bias, dtype):
    made = packed(linear(bias), bits)
    x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = nn.functional.linear(x.double(), values(made).double())
    want = want if made.bias is None else want + made.bias.double()
    got = made(x)
    assert got.dtype == dtype and got.shape == (2, 5, 40)
    assert (got - want).norm() <= 2 * torch.finfo(dtype).eps * want.norm() + 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_do_not_see_each_other(bits):
    made, x = packed(linear(), bits), torch.randn(3, 96)
    changed = x.clone()
    changed[2] = 1e3
    assert torch.equal(made(x)[:2], made(changed)[:2])


@pytest.mark.parametrize("bits", [8, 4])
def test_casts_leave_codes_and_scales_alone(bits):
    made = packed(linear(), bits)
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.half().float()
    for name, tensor in made.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_and_groups_of_zeros(bits):
    like = linear()
    like.weight.data[3] = 0
    like.weight.data[4, :32] = 0
    made = packed(like, bits)
    assert values(made).isfinite().all()
    assert not values(made)[3].any() and not values(made)[4, :32].any()


def test_float16_overflows_where_nothing_widens():
    made = packed(linear(bias=False), 8)
    made.scale.data.fill_(100.0)
    x = torch.full((1, 96), 100.0, dtype=torch.float16)
    assert not made(x).isfinite().all()
    made.widens = True
    assert made(x).dtype == torch.float32 and made(x).isfinite().all()
    assert made(x.bfloat16()).dtype == torch.bfloat16


def test_integers_in_groups_of_32_are_read_as_format_1_has_them():
    like = linear(bias=False, width=128)
    made = WeightOnlyLinear(like, 4, "int4")
    scale = weight_scales(like.weight.data, 4, clip=True)
    made.weight.data = pack_int4(codes_on_grid(like.weight.data, scale)).view(torch.int8)
    made.scale.data = scale
    want = dequantize_weight(codes_on_grid(like.weight.data, scale), scale)
    x = torch.randn(3, 128)
    torch.testing.assert_close(made(x), x @ want.mT)


@pytest.mark.parametrize("width, groups", [(128, 2), (96, 3)])
def test_levels_have_groups_of_64_or_of_32(width, groups):
    made = packed(linear(width=width), 4)
    assert made.scale.shape == (40, groups) and made.spec.weights.element == "lm4"


def test_a_second_moment_moves_the_error_to_where_inputs_are_small():
    like, generator = linear(bias=False, width=128), torch.Generator().manual_seed(2)
    mix = torch.randn(128, 128, generator=generator)
    x = torch.randn(512, 16, generator=generator) @ mix[:16]  # 16 of 128 directions
    moment = x.mT @ x / len(x)
    lost = []
    for given in ((), (moment, 512)):
        made = packed(like, 4)
        made.weight.data, made.scale.data = rounded(like.weight.data, 4, *given)
        lost.append((made(x) - like(x)).norm() / like(x).norm())
    assert lost[1] < 0.3 * lost[0]


def test_what_it_takes():
    assert takes(nn.Linear(96, 8), 4) and takes(nn.Linear(100, 8), 8)
    assert not takes(nn.Linear(100, 8), 4)  # no whole groups
    assert not takes(nn.Conv1d(96, 8, 1), 8) and not takes(packed(linear(), 8), 8)


def embedding(dtype=torch.float32) -> tuple[nn.Embedding, WeightOnlyEmbedding]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(50, 24, generator=generator) * torch.logspace(-4, 2, 50)[:, None]
    rows[7] = 0
    like = nn.Embedding.from_pretrained(rows.to(dtype), padding_idx=7)
    made = WeightOnlyEmbedding(like)
    made.weight.data, scale = rounded(like.weight.data, 8)
    made.scale.data = scale.to(dtype)
    return like, made


def test_no_embedding_is_off_by_more_than_half_a_step():
    like, made = embedding()
    lost = made(torch.arange(50)) - like.weight
    assert (lost.abs() <= made.scale / 2 * (1 + 1e-5)).all() and lost.abs().max() > 0
    assert not made(torch.tensor(7)).any()
    decibels = 10 * (like.weight.square().sum() / lost.square().sum()).log10()
    assert 40 < decibels < 50


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_looks_up_what_its_codes_say(dtype):
    _, made = embedding(dtype)
    made.scale.data.clamp_(min=1e-3)  # of float16's normal numbers
    tokens = torch.tensor([[0, 7, 49], [3, 3, 1]])
    want = made.weight[tokens].double() * made.scale[tokens].double()
    assert torch.equal(made(tokens), want.to(dtype))
    made.factor = 7.7
    assert torch.equal(made(tokens), want.to(dtype) * torch.tensor(7.7).to(dtype))


def test_casts_change_the_dtype_of_scales_alone():
    _, made = embedding()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    made.bfloat16().float()
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
    assert made.half()(torch.tensor([1])).dtype == torch.float16


def test_a_head_with_the_weights_of_an_embedding_multiplies_them(monkeypatch):
    _, made = embedding()
    head = WeightOnlyLinear(nn.Linear(24, 50, bias=True), 8)
    head.weight, head.scale = made.weight, made.scale
    head.bias.data = torch.linspace(-1, 1, 50).bfloat16()
    x = torch.randn(3, 24).double()
    made.double()
    want = x @ made(torch.arange(50)).mT + head.bias
    torch.testing.assert_close(head(x), want)
    monkeypatch.setattr(weight_only, "PART", 24 * 7)  # 7 rows at a time, the last of them one
    torch.testing.assert_close(head(x), want)


def test_weights_are_rounded_in_parts(monkeypatch):
    weight = embedding()[0].weight.data
    want = rounded(weight, 8)
    monkeypatch.setattr(weight_only, "PART", 16 * 24 * 7)
    assert all(map(torch.equal, rounded(weight, 8), want))


def test_what_it_looks_up():
    assert takes_embedding(nn.Embedding(3, 4)) and not takes_embedding(nn.Linear(3, 4))
    assert not takes_embedding(nn.Embedding(3, 4, max_norm=1.0))  # which it would write
    assert not takes_embedding(type("Other", (nn.Embedding,), {})(3, 4))
