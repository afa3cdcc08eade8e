"""Packed linears on a real GPU, every number format and engine, against float64.

The rule for accuracy explains itself: the error must be below twice that of the specification run
by plain torch in the same dtype, on the same GPU. Codes at a tie may fall to either side in both,
so an error is taken over at least 64 rows, however few of them one call has.
"""

import dataclasses
import itertools

import pytest
import torch
from formats import DEVICE, FORMATS, inputs, random_linear, spec_of
from tiny_spec import tiny_spec
from torch import Tensor, nn

pytest.importorskip("triton")

from dirotq.kernels import engine
from dirotq.kernels.buffers import Packed
from dirotq.kernels.chip import capability
from dirotq.kernels.formats.lm4 import unpack_lm4
from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.plan import Plan, candidates_for, name_of
from dirotq.kernels.transform_quantize.kernel import MAX_RANK
from dirotq.kernels.unpack_w4 import unpack_w4
from dirotq.kernels.unpack_w4.kernel import launch as unpack
from dirotq.kernels.w4a16_linear import tiles as w4a16
from dirotq.kernels.w4a16_linear.kernel import launch as multiply_w4a16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("full_float32"),
]

CHIP = capability(DEVICE) or 90
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
ROWS = 64

PER_ROW = ("pow2", "token", "token-r0", "w4a8", "w4a16", "lm4", "lm4-w4a16")
"""Formats that every width of a multiple of 8 can have (w4a16 then has one scale per row)."""


def errors(got: Tensor, x: Tensor, module: QuantLinear) -> tuple[float, float]:
    """Relative error against float64: of ``got``, and of plain torch in x's dtype."""
    want = engine.reference(x.double(), module.packed(), module.spec)
    plain = engine.reference(x, module.packed(), module.spec)
    size = want.norm()
    return tuple(float((y.double() - want).norm() / size) for y in (got, plain))


def assert_accurate(got: Tensor, x: Tensor, module: QuantLinear) -> None:
    assert got.dtype == x.dtype
    assert got.isfinite().all()
    ours, torchs = errors(got, x, module)
    assert ours < 2 * torchs, f"relative error {ours:.2e}, plain torch {torchs:.2e}"


def in_calls_of(rows: int, module: nn.Module, x: Tensor) -> Tensor:
    """All of x, a few rows a call."""
    return torch.cat([module(part) for part in x.split(rows)])


def plans(name: str) -> list[Plan]:
    """Every plan for one row and for many."""
    spec = spec_of(name, 2240, 1008)
    found = itertools.chain(
        *(candidates_for(CHIP, m, spec.outputs, spec, torch.bfloat16) for m in (1, 33))
    )
    return list({name_of(plan): plan for plan in found}.values())


ENGINES = [
    pytest.param(name, plan, id=f"{name}-{name_of(plan)}")
    for name in (
        "pow2",
        "rms",
        "floats",
        "token",
        "groups",
        "w4a8",
        "w4a8-groups",
        "dense",
        "w4a16-protected",
        "lm4",
        "lm4-floats",
        "lm4-w4a8",
        "lm4-groups",
        "lm4-w4a16",
        "nvfp4",
        "mxfp4",
        "nvfp4-w4a16",
        "mxfp4-w4a16",
    )
    for plan in plans(name)
]
ONE_OF_EACH = [
    pytest.param("pow2", plan, id=f"{plan.engine}{'-tma' if getattr(plan.tile, 'tma', 0) else ''}")
    for plan in {(p.engine, getattr(p.tile, "tma", 0)): p for p in plans("pow2")}.values()
] + [
    pytest.param(name, plans(name)[0], id=name.removesuffix("-protected"))
    for name in ("w4a16-protected", "lm4", "nvfp4", "mxfp4")
]


@pytest.mark.parametrize(("name", "plan"), ENGINES)
def test_every_plan(name, plan, empty_is):
    module, x = random_linear(spec_of(name, 2240, 1008)), inputs(ROWS, 2240)
    with empty_is(255):
        got = [engine.linear(plan, part, module.packed(), module.spec) for part in x.split(33)]
    assert_accurate(torch.cat(got), x, module)


@pytest.mark.parametrize("rows", [1, 7, 33, 4608])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name, rows, empty_is):
    module, x = random_linear(spec_of(name, 2240, 1000)), inputs(max(rows, ROWS), 2240)
    if name == "floats" and CHIP < 89:
        pytest.skip("8-bit floats need FP8 matrix units")
    assert module.plan(rows).engine != "reference"
    with empty_is(255):
        got = in_calls_of(rows, module, x)
    assert_accurate(got, x, module)


@HALVES
@pytest.mark.parametrize("rows", [1, 33, 4608])
@pytest.mark.parametrize(("dim", "outputs"), [(1000, 2240), (5600, 1000), (2240, 5600)])
@pytest.mark.parametrize("name", PER_ROW)
def test_sizes_off_the_tiles(name, dim, outputs, rows, dtype, empty_is):
    module, x = random_linear(spec_of(name, dim, outputs)), inputs(max(rows, ROWS), dim, dtype)
    assert module.plan(rows, dtype).engine != "reference"
    with empty_is(255):
        got = in_calls_of(rows, module, x)
    assert_accurate(got, x, module)


@HALVES
@pytest.mark.parametrize("rows", [1, 33, 600])
@pytest.mark.parametrize(("dim", "outputs"), [(1120, 1000), (2208, 2240)])
@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nvfp4-w4a16", "mxfp4-w4a16"])
def test_fp4_sizes_off_the_tiles(name, dim, outputs, rows, dtype, empty_is):
    module, x = random_linear(spec_of(name, dim, outputs)), inputs(max(rows, ROWS), dim, dtype)
    plan = module.plan(rows, dtype)
    assert plan.engine == "fp4"
    with empty_is(255):
        got = in_calls_of(rows, module, x)
    assert_accurate(got, x, module)


@pytest.mark.parametrize("block", [1, 32, 64, 128, 256, 512])
def test_every_hadamard_block(block, empty_is):
    spec = QuantSpec.from_dict(spec_of("pow2", 3072, 1008).to_dict() | {"block": block})
    module, x = random_linear(spec), inputs(ROWS, 3072)
    with empty_is(255):
        assert_accurate(module(x), x, module)


@pytest.mark.parametrize("rank", [1, 8, 16, 100, MAX_RANK, MAX_RANK + 1])
@pytest.mark.parametrize("rows", [33, 600])
def test_every_rank(rank, rows):
    spec = dataclasses.replace(spec_of("pow2", 2240, 1008), rank=rank)
    module, x = random_linear(spec), inputs(max(rows, ROWS), 2240)
    assert_accurate(in_calls_of(rows, module, x), x, module)


@pytest.mark.parametrize(("name", "plan"), ONE_OF_EACH)
@pytest.mark.parametrize("kind", ["outlier", "in-the-basis", "all-equal", "denormal", "huge"])
def test_adversarial_rows(name, plan, kind):
    module = random_linear(spec_of(name, 2240, 1008))
    x = inputs(ROWS, 2240)
    if kind == "outlier":
        x[torch.arange(ROWS), torch.arange(ROWS) * 7] = 1e4
    elif kind == "in-the-basis":
        inside = 100 * inputs(ROWS, 64).float() @ module.basis.float().T
        x = (x.float() + inside).to(x.dtype)
    elif kind == "all-equal":
        x = x[:, :1].expand_as(x)
    elif kind == "denormal":
        x = x * 1e-39
        module.bias.zero_()
    else:  # as large as float32 holds the squares of, where the scale is made of them
        x = x * (1e15 if module.spec.activations.statistic == "rms" else 1e30)
    got = engine.linear(plan, x, module.packed(), module.spec)
    assert got.isfinite().all()
    if kind == "denormal":  # below what a scale can hold: nothing, or at most what went in
        assert float(got.abs().max()) < 1e-34
    else:
        assert_accurate(got, x, module)


@pytest.mark.parametrize(("name", "plan"), ONE_OF_EACH)
def test_zero_rows_give_the_bias_and_leave_the_others_alone(name, plan):
    module, x = random_linear(spec_of(name, 2240, 1008)), inputs(ROWS, 2240)
    want = engine.linear(plan, x, module.packed(), module.spec)
    x[5:9] = 0
    got = engine.linear(plan, x, module.packed(), module.spec)
    bias = module.bias.expand(4, -1).float()
    step = module.wscale.float().amax(1)
    # As two FP8 numbers the bias keeps eight bits, and a 64th of a code's worth.
    assert ((got[5:9].float() - bias).abs() <= bias.abs() * 2**-7 + step / 64).all()
    kept = [i for i in range(ROWS) if not 5 <= i < 9]
    assert torch.equal(got[kept], want[kept])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "pow2", "rms", "floats", "token-r0", "groups-r0", "w4a8", "w4a8-groups", "w4a16", "nvfp4",
        "mxfp4", "mxfp4-r0",
    ],
)  # fmt: skip
@pytest.mark.parametrize("rows", [16, 600])
def test_bad_numbers_show_and_stay_in_their_row(name, rows, bad):
    module, x = random_linear(spec_of(name, 2240, 1008)), inputs(rows, 2240)
    want = module(x)
    x[3, 1234] = bad
    got = module(x)
    assert not got[3].isfinite().any()
    kept = [i for i in range(rows) if i != 3]
    assert torch.equal(got[kept], want[kept])


@pytest.mark.parametrize(
    ("name", "plan"),
    [p for p in ENGINES if p.values[0] in ("token", "w4a8") and p.values[1].engine != "w4a16"],
)
@pytest.mark.parametrize("signs", ["equal", "aligned"])
def test_longest_sums_of_largest_codes(name, plan, signs, record_property, capsys):
    """K = 15360 products of +-7 and +-7 (+-127): |sum| reaches 752,640, or 13.6 million."""
    spec = tiny_spec(dim=15360, rows=(256,), act_bits=8 if name == "w4a8" else 4)
    module = random_linear(spec, bias=False)
    sign = torch.ones(256, 15360, device=DEVICE)
    if signs == "aligned":  # row i of x has the signs of weight row i: its sum is the largest
        sign = torch.sign(torch.randn(256, 15360, device=DEVICE))
    module.qweight.copy_(pack_int4((7 * sign).to(torch.int8)))
    module.wscale.fill_(1 / 16)
    x = (3 * sign).to(torch.bfloat16)
    got = engine.linear(plan, x, module.packed(), module.spec)
    want = (x.double() @ sign.double().T * 7 / 16).diagonal()
    error = float(((got.double().diagonal() - want) / want).abs().max())
    record_property("relative_error", error)
    with capsys.disabled():
        print(f"\n{name} {name_of(plan)} {signs}: largest relative error {error:.1e}", end=" ")
    # Integers add up exactly; what is left is the rounding of bf16. Hopper's FP8 sums keep 13 bits
    # below their leading one: equal products no longer count once 2^13 of them have added up, which
    # takes a row and an output that agree in every sign (docs/kernels.md).
    assert error < (0.31 if plan.container == "fp8" else 2**-8)


@pytest.mark.parametrize("container", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("width", [64, 1000, 2240, 3072])
@pytest.mark.parametrize("element", ["int4", "lm4"])
def test_unpacked_codes_are_exact(container, width, element, empty_is):
    q = torch.randint(256, (100, width // 2), device=DEVICE, dtype=torch.uint8)
    with empty_is(255):
        got, scale = unpack(Packed(q, q.new_empty(0)), container, element=element)
    assert scale is None
    want = unpack_w4(q, container, element=element)
    assert torch.equal(got.view(torch.int8), want.view(torch.int8))


@pytest.mark.parametrize("tile", [t for tiles in w4a16.TILES.values() for t in tiles], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_every_level_at_every_place(tile, dtype):
    """One row of the identity picks one column: each nibble, in each place of a word, exactly."""
    if not w4a16.takes_tables(tile) or (tile in w4a16.TILES["wide"] and CHIP != 90):
        pytest.skip("not a tile for levels here")
    columns = torch.arange(256, device=DEVICE)
    nibbles = (columns[None, :] + columns[:16, None]) % 16
    q = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).to(torch.uint8)
    one = torch.ones(16, 4, dtype=torch.bfloat16, device=DEVICE)
    x = torch.eye(256, dtype=dtype, device=DEVICE)
    got = multiply_w4a16(x, Packed(q, one), tile=tile, element="lm4")
    assert torch.equal(got.T.float(), unpack_lm4(q).float() / 16)
