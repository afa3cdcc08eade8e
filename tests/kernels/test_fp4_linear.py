"""FP4 linears by their kernels against the specification, in the interpreter where there is no GPU.

Without a GPU the kernel decodes numbers itself: ``tl.dot_scaled`` runs on GPUs alone.
"""

import pytest
import torch
from formats import DEVICE, inputs, random_linear
from tiny_spec import FP4, tiny_spec
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import interpreter

from dirotq.kernels import engine
from dirotq.kernels.buffers import Packed
from dirotq.kernels.formats.fp4 import steps, unpack_e2m1
from dirotq.kernels.formats.quantize_weight import dequantize_weight, unpack_weight
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.fp4_linear import kernel
from dirotq.kernels.fp4_linear.kernel import builds, config, launch
from dirotq.kernels.fp4_linear.tiles import TILES, Tile, fits, step, variant
from dirotq.kernels.plan import candidates_for, name_of
from dirotq.kernels.prologue import plain
from dirotq.kernels.transform_quantize.fp4 import launch as round_rows
from dirotq.kernels.w4a4_linear import w4a4_linear
from dirotq.kernels.w4a16_linear import w4a16_linear

HALF = torch.float16
SMALL = Tile(bm=16, bn=32, bk=128, warps=4, stages=2, group_m=2)
every_format = pytest.mark.parametrize("name", FP4)
sizes = pytest.mark.parametrize(
    ("rows", "outputs", "width"), [(1, 40, 64), (33, 72, 192), (7, 3, 96), (16, 32, 256)]
)


def spec_of(name: str, width: int, outputs: int, *, act_bits: int = 4, rank: int = 0) -> QuantSpec:
    changes = FP4[name] if act_bits == 4 else {k: v for k, v in FP4[name].items() if "act" not in k}
    return tiny_spec(dim=width, rows=(outputs,), act_bits=act_bits, rank=rank, **changes)


def close(got: Tensor, want: Tensor) -> None:
    """float32 against float32: only the order of the sum differs."""
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * float(want.abs().max()))


@every_format
@sizes
@pytest.mark.parametrize("rank", [0, 8])
def test_products_of_codes(name, rows, outputs, width, rank, empty_is):
    spec = spec_of(name, width, outputs, rank=rank)
    module, x = random_linear(spec, bias=rank > 0), inputs(rows, width, HALF)
    p = module.packed()
    codes = round_rows(plain(x[None]), p.basis, None, spec)
    with empty_is(255):
        got = launch(codes, p, width=width, out_dtype=torch.float32, tile=SMALL)
    numbers = unpack_e2m1(codes.codes), steps(codes.scale, column(codes.row))
    close(got, w4a4_linear(*numbers, codes.c, p.qweight, p.wscale, p.wp, p.bias, p.wglobal))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the GPU's own product runs")
@every_format
@sizes
def test_products_of_chips_that_multiply_fp4(name, rows, outputs, width, monkeypatch):
    """As above; ``tl.dot_scaled`` by what it is documented to compute."""
    module, x = random_linear(spec_of(name, width, outputs)), inputs(rows, width, HALF)
    codes, p = round_rows(plain(x[None]), None, None, module.spec), module.packed()
    want = launch(codes, p, width=width, out_dtype=torch.float32, tile=SMALL)
    called = []

    def dot_scaled(left, left_scale, left_format, right, right_scale, right_format, acc, *_):
        assert left_format == right_format == "e2m1"
        called.append(acc)
        a, b = numbers(left, left_scale, name), numbers(tl.trans(right), right_scale, name)
        total = torch.from_numpy(acc.handle.data) + a @ b.T
        return tl.tensor(interpreter.TensorHandle(total.numpy(), tl.float32), acc.type)

    monkeypatch.setattr(interpreter.interpreter_semantic, "dot_scaled", dot_scaled)
    monkeypatch.setattr(kernel, "capability", lambda device: 100)
    close(launch(codes, p, width=width, out_dtype=torch.float32, tile=SMALL), want)
    assert called


def numbers(block, scale, name: str) -> Tensor:
    """What a block of the interpreter and its scales [rows, groups] mean, float32."""
    assert scale.dtype == (tl.float8e4nv if name == "nvfp4" else tl.uint8)
    codes, scale_bytes = (torch.from_numpy(t.handle.data.copy()) for t in (block, scale))
    one = torch.ones(()) if name == "nvfp4" else None
    step = steps(scale_bytes.view(torch.uint8), one)
    return (unpack_e2m1(codes).unflatten(1, (step.shape[1], -1)) * step[..., None]).flatten(1)


def column(row: Tensor | None) -> Tensor | None:
    return None if row is None else row[:, None]


@every_format
@sizes
def test_products_of_sixteen_bits(name, rows, outputs, width, empty_is):
    p = random_linear(spec_of(name, width, outputs, act_bits=16)).packed()
    x = inputs(rows, width, HALF)
    with empty_is(255):
        got = launch(x, p, width=width, out_dtype=torch.float32, tile=SMALL)
    close(got, w4a16_linear(x, p.qweight, p.wscale, p.bias, p.wglobal))
    wide = torch.stack([x, x.new_full(x.shape, torch.nan)], -1).flatten(1)
    again = launch(wide[:, ::2], p, width=width, out_dtype=torch.float32, tile=SMALL)
    assert torch.equal(again, got)


@pytest.mark.parametrize(("name", "group", "low", "high"), [("nvfp4", 16, 0, 126),
                                                            ("mxfp4", 32, 28, 250)])  # fmt: skip
def test_every_number_and_scale_is_exact(name, group, low, high):
    """Weights times a unit matrix; E8M0 up to where 6 times it overflows."""
    scales = torch.arange(low, low + 256).clamp_max(high).to(torch.uint8).view(-1, 256 // group)
    codes = torch.arange(256, dtype=torch.uint8).roll(37).view(1, 2, 128)[:, 0]
    both = torch.cat([codes, codes.flip(1)]).repeat(len(scales) // 2, 1)
    p = Packed(both.to(DEVICE), scales.to(DEVICE), torch.ones(1).to(DEVICE))
    p = p if name == "nvfp4" else p._replace(wglobal=None)
    unit = torch.eye(256, dtype=HALF, device=DEVICE)
    got = launch(unit, p, width=256, out_dtype=torch.float32, tile=SMALL)
    assert torch.equal(got.T, dequantize_weight(*unpack_weight(p.qweight, p.wscale, p.wglobal)))


@every_format
@pytest.mark.parametrize("act_bits", [4, 16])
@pytest.mark.parametrize("width", [192, 224])
def test_every_plan(name, act_bits, width, empty_is):
    spec = spec_of(name, width, 48, act_bits=act_bits, rank=24)
    module, x = random_linear(spec), inputs(64, width, HALF)
    want = engine.reference(x.double(), module.packed(), spec)
    plain_torch = engine.reference(x, module.packed(), spec).double() - want
    found = {name_of(p): p for m in (1, 64) for p in candidates_for(90, m, 48, spec, HALF)}
    assert len(found) >= 2
    for plan in found.values():
        with empty_is(255):
            got = engine.linear(plan, x, module.packed(), spec)
        assert got.dtype == HALF
        error = got.double() - want
        assert error.norm() < 2 * plain_torch.norm() + 2.0**-9 * want.norm(), plan


@every_format
def test_a_bad_scale_of_a_row_shows_in_that_row_alone(name):
    spec = spec_of(name, 64, 40)
    module, x = random_linear(spec), inputs(5, 64, HALF)
    codes = round_rows(plain(x[None]), None, None, spec)
    want = launch(codes, module.packed(), width=64, out_dtype=HALF, tile=SMALL)
    codes.scale[3, 1] = 127 if name == "nvfp4" else 255
    got = launch(codes, module.packed(), width=64, out_dtype=HALF, tile=SMALL)
    assert got[3].isnan().all()
    assert torch.equal(got[[0, 1, 2, 4]], want[[0, 1, 2, 4]])


@pytest.mark.parametrize("act_bits", [4, 16])
def test_no_rows_and_rows_of_the_weight(act_bits):
    spec = spec_of("nvfp4", 64, 40, act_bits=act_bits)
    module, x = random_linear(spec), inputs(5, 64, HALF)
    plan = candidates_for(90, 5, 40, spec, HALF)[0]
    whole = engine.linear(plan, x, module.packed(), spec)
    part = engine.linear(plan, x, module.packed().rows(slice(17, 40)), spec)
    assert torch.equal(part, whole[:, 17:])
    assert engine.linear(plan, x[:0], module.packed(), spec).shape == (0, 40)


def test_what_multiplies():
    """Chips with FP4 units take them, a newer one too; Triton decodes MXFP4 elsewhere, we NVFP4."""
    assert [variant(c) for c in (None, 90, 100, 103, 120)] == [
        "decoded", "decoded", "native", "native", "native",
    ]  # fmt: skip

    def scaled(name, chip, rounded=True):
        more = {"rounded": rounded, "dtype": torch.bfloat16, "rank": 0, "bias": False}
        made = config(SMALL, 256, name, chip, **more)
        return made.constants["SCALED"]

    assert [scaled("nvfp4", c) for c in (None, 80, 90, 100, 120)] == [False] * 3 + [True] * 2
    assert [scaled("mxfp4", c) for c in (None, 80, 90, 100, 120)] == [False] + [True] * 4
    assert not scaled("mxfp4", 120, rounded=False)


def test_steps_fill_the_width_or_have_the_columns_of_an_instruction():
    tile = Tile(bm=16, bn=32, bk=256, warps=4, stages=2)
    assert [step(tile, width) for width in (3072, 1152, 2240, 96)] == [256, 128, 64, 64]


def test_every_chip_has_tiles_of_every_kind():
    for chip in (80, 86, 89, 90, 100, 120):
        for kind in {variant(chip), "decoded"}:
            for width in (3072, 2208):
                fitting = [tile.bm for tile in TILES[kind] if fits(tile, kind, chip, width)]
                assert min(fitting) <= 16 and max(fitting) >= 64, (chip, kind, width)


def test_builds_name_every_argument():
    every = builds()
    assert len({build.name for build in every}) == len(every)
    for build in every:
        assert set(build.signature) | set(build.constants) == set(build.kernel.arg_names)
        assert not set(build.signature) & set(build.constants), build.name
