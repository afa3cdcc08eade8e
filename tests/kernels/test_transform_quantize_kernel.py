"""The Triton ``transform_quantize`` against its specification; interpreted where there is no GPU.

Inputs are fp16 (bf16 is wrong in the interpreter). Two kinds of comparison:

Exact ones. Inputs are built from their codes, so that every intermediate is a short binary
fraction, and all codes, scales, coefficients and bytes of the appended columns must be equal.

Close ones. z differs from the float64 specification by what 16-bit c and z cost, so a code may
differ only where z is that near to a tie; where it does, it is the neighbour.
"""

import pytest
import torch
from exact import exact_case
from formats import DEVICE
from tiny_spec import tiny_spec
from torch import Tensor

pytest.importorskip("triton")

from builds.transform_quantize import builds

from dirotq.kernels.appended import columns_with_appended, with_appended
from dirotq.kernels.formats.activation import POW2_LEVELS
from dirotq.kernels.formats.hadamard import block_hadamard
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.permuted import from_permuted, padded
from dirotq.kernels.transform_quantize import quantize_rows, transform
from dirotq.kernels.transform_quantize.kernel import MAX_RANK, launch

INT8, FP8 = torch.int8, torch.float8_e4m3fn


EXACT = {
    "token": tiny_spec(dim=160, block=16, rank=8),
    "token-b1": tiny_spec(dim=160),
    "token-b64": tiny_spec(dim=192, block=64, rank=24),
    "token-b256": tiny_spec(dim=256, block=256, rank=64),
    "pow2-16": tiny_spec(dim=160, block=16, rank=24, act_scale="pow2"),
    "pow2-32": tiny_spec(dim=160, block=16, rank=8, act_scale="pow2", act_group=32),
    "pow2-64": tiny_spec(dim=320, block=1, act_scale="pow2", act_group=64),
    "pow2-128": tiny_spec(dim=256, block=16, rank=8, act_scale="pow2", act_group=128),
    "lm4": tiny_spec(dim=160, block=16, rank=24, act_scale="pow2", weight_scale="lm4_channel"),
    "group-16": tiny_spec(dim=160, block=16, rank=8, act_scale="group"),
    "group-32": tiny_spec(dim=160, block=1, act_scale="group", act_group=32),
    "group-64": tiny_spec(dim=192, block=16, rank=24, act_scale="group", act_group=64),
    "group-128": tiny_spec(dim=256, block=16, rank=8, act_scale="group", act_group=128),
    "w4a8": tiny_spec(dim=160, block=16, rank=8, act_bits=8),
    "w4a8-b1-group": tiny_spec(dim=160, act_bits=8, act_scale="group", act_group=32),
}


@pytest.mark.parametrize(
    ("name", "container"),
    [pytest.param(name, INT8, id=f"{name}-int8") for name in EXACT]
    + [pytest.param(name, FP8, id=f"{name}-fp8") for name in ("token", "pow2-64", "group-16")],
)
def test_exact_inputs_give_exact_codes(name, container, empty_is):
    spec = EXACT[name]
    for rows, byte in ((7, 255), (3, 0)):
        x, p, z, c = exact_case(spec, rows)
        with empty_is(byte):
            codes, scale, got_c = launch(x, p, None, spec, container=container)
        want, want_scale = quantize_rows(z, spec)
        assert codes.shape == (rows, padded(spec.width))
        assert torch.equal(from_permuted(codes.float(), spec.width), want.float())
        assert not codes.float()[:, padded(spec.width) - 64 :].isnan().any()
        assert codes.float().abs().sum() == want.float().abs().sum()  # the padding is zero
        torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)
        assert (got_c is None) == (spec.rank == 0)
        assert got_c is None or torch.equal(got_c, c)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", ["token", "token-b1", "token-b64", "pow2-16", "pow2-64", "lm4"])
def test_exact_inputs_give_exact_appended_columns(name, bias, empty_is):
    spec = EXACT[name]
    x, p, z, c = exact_case(spec, 7)
    c = c if spec.rank else None
    levels = POW2_LEVELS if spec.activations.name == "pow2" else 0
    codes, scale = quantize_rows(z, spec)
    want, want_scale = with_appended(
        codes, scale, c, bits_below=levels, bias=bias, counted=16 if name == "lm4" else 1
    )
    for byte in (255, 0):
        with empty_is(byte):
            got, got_scale, none = launch(x, p, None, spec, container=FP8, appended=True, bias=bias)
        assert none is None
        assert got.shape == (7, columns_with_appended(spec.width, spec.rank, bias))
        assert torch.equal(got.float(), want.float())
        assert torch.equal(got_scale, want_scale)


@pytest.mark.parametrize("width", [128, 160])
def test_asked_for_appended_columns_of_which_there_are_none(width):
    """Rank 0 and no bias: codes in their units all the same, as the weights have them."""
    spec = tiny_spec(dim=width)
    x, _, z, _ = exact_case(spec, 3)
    want, want_scale = with_appended(*quantize_rows(z, spec), None, bits_below=0, bias=False)
    got, scale, _ = launch(x, None, None, spec, container=FP8, appended=True)
    assert torch.equal(got.float(), want.float())
    assert torch.equal(scale, want_scale)


def close_case(
    spec: QuantSpec, rows: int, seed: int = 0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gaussian x (fp16) with an outlier channel, an orthonormal P and a rotation (bf16)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, spec.in_features, generator=g)
    x[:, 3] *= 20
    vectors = (
        torch.linalg.qr(torch.randn(spec.in_features, spec.in_features, generator=g))
        .Q.bfloat16()
        .to(DEVICE)
    )
    p = vectors[:, : spec.rank].contiguous() if spec.rank else None
    rest = vectors[:, spec.rank :]
    pad = (0, spec.width - rest.shape[1])
    t = torch.nn.functional.pad(rest, pad) if spec.transform.kind == "dense" else None
    return x.half().to(DEVICE), p, t


def assert_close(spec: QuantSpec, x: Tensor, p: Tensor | None, t: Tensor | None, flips: float):
    """Codes within half a step of float64's z, but for what 16 bits cost; few of them differ."""
    codes, scale, c = launch(x, p, t, spec, container=INT8)
    double = (None if b is None else b.double() for b in (p, t))
    z, want_c = transform(x.double(), *double, spec)
    want, want_scale = quantize_rows(z, spec)
    size = x.double().norm(dim=1, keepdim=True)
    if want_c is not None:
        assert c is not None and c.dtype == x.dtype
        assert ((c.double() - want_c).abs() <= 2.0**-10 * size).all()
    noise = 2.0**-11 * size
    groups = want_scale.shape[1]
    assert ((scale.double() - want_scale.double()).abs() <= noise).all()
    got = from_permuted(codes, spec.width)

    def values(q: Tensor, s: Tensor) -> Tensor:
        return (q.double().unflatten(1, (groups, -1)) * s.double()[..., None]).flatten(1)

    step = want_scale.double().repeat_interleave(spec.width // groups, 1)
    error = (values(got, scale) - z).abs()
    if spec.activations.name == "pow2":
        # Steps are powers of two above the finest; the 0.9 clip may cut 0.78 of one off.
        peaks = z.abs().unflatten(1, (-1, spec.activations.group)).amax(-1)
        share = 0.9 * peaks / z.abs().amax(1, keepdim=True)
        power = torch.exp2(share.log2().ceil().clamp(-POW2_LEVELS, 0) + POW2_LEVELS)
        step = step * power.repeat_interleave(spec.activations.group, 1)
        assert (error <= 1.02 * step + noise).all()
    else:
        assert (error <= step / 2 + 2 * noise).all()
    differ = got != want
    assert ((values(got, scale) - values(want, want_scale)).abs() <= 1.6 * step + noise).all()
    assert differ.double().mean() <= flips


CLOSE = {
    "b1": tiny_spec(dim=160),
    "b16": tiny_spec(dim=160, block=16, rank=8),
    "b32": tiny_spec(dim=352, block=32, rank=24, act_scale="pow2"),
    "b64": tiny_spec(dim=192, block=64, rank=64, act_scale="pow2", act_group=64),
    "b128": tiny_spec(dim=384, block=128, rank=8, act_scale="group", act_group=64),
    "b256": tiny_spec(dim=256, block=256, rank=24, act_scale="pow2", act_group=32),
    "b512": tiny_spec(dim=512, block=512, rank=8, act_scale="pow2", act_group=128),
    "b512-plain": tiny_spec(dim=512, block=512),
    "rank-1": tiny_spec(dim=160, block=32, rank=1),
    "rank-beyond": tiny_spec(dim=320, block=64, rank=MAX_RANK + 8),
    "group-16": tiny_spec(dim=160, block=32, rank=8, act_scale="group"),
    "w4a8": tiny_spec(dim=160, block=32, rank=8, act_bits=8),
    "w4a8-group": tiny_spec(dim=192, block=64, rank=8, act_bits=8, act_scale="group", act_group=32),
    "dense": tiny_spec(dim=160, rank=24, transform="dense"),
    "dense-pow2": tiny_spec(dim=160, rank=8, transform="dense", act_scale="pow2"),
    "dense-r0": tiny_spec(dim=160, transform="dense", act_scale="group"),
}


@pytest.mark.parametrize("spec", CLOSE.values(), ids=CLOSE)
def test_codes_differ_from_the_reference_only_near_ties(spec):
    # A flip needs z within its 16-bit rounding of a tie: 1 % at 4 bits, 18 times that at 8.
    assert_close(spec, *close_case(spec, 33), flips=0.02 if spec.activations.bits == 4 else 0.2)


@pytest.mark.parametrize("name", ["b32", "w4a8"])
@pytest.mark.parametrize("rows", [1, 7])
def test_few_rows(name, rows):
    spec = CLOSE[name]
    flips = 0.05 if spec.activations.bits == 4 else 0.3
    assert_close(spec, *close_case(spec, rows, seed=rows), flips=flips)


@pytest.mark.parametrize("name", ["b32", "rank-beyond"])
def test_rows_may_lie_anywhere(name):
    spec = CLOSE[name]
    x, p, t = close_case(spec, 9)
    wide = x.new_full((9, spec.in_features + 24), torch.nan)
    wide[:, 5 : 5 + spec.in_features] = x
    for got, want in zip(
        launch(wide[:, 5 : 5 + spec.in_features], p, t, spec, container=INT8),
        launch(x, p, t, spec, container=INT8),
        strict=True,
    ):
        assert (got is None and want is None) or torch.equal(got, want)
    every_other = torch.stack([x, x.new_full(x.shape, torch.nan)], 1)[:, 0]
    assert torch.equal(
        launch(every_other, p, t, spec, container=INT8)[0], launch(x, p, t, spec, container=INT8)[0]
    )


SCALES = {
    "token": tiny_spec(dim=160, block=32, rank=8),
    "pow2": tiny_spec(dim=160, block=32, rank=8, act_scale="pow2"),
    "group": tiny_spec(dim=160, block=32, rank=8, act_scale="group", act_group=32),
    "w4a8": tiny_spec(dim=160, block=32, rank=8, act_bits=8),
}
every_scale = pytest.mark.parametrize("spec", SCALES.values(), ids=SCALES)


@pytest.mark.parametrize(
    ("name", "appended"), [*((name, False) for name in SCALES), ("token", True), ("pow2", True)]
)
def test_rows_of_nothing(name, appended):
    spec = SCALES[name]
    x, p, _ = close_case(spec, 5)
    x[1] = 0
    x[2] = 6e-8  # the smallest fp16 there is
    container = FP8 if appended else INT8
    codes, scale, c = launch(
        x, p, None, spec, container=container, appended=appended, bias=appended
    )
    assert not codes.float()[1, : padded(spec.in_features)].any()
    assert scale.isfinite().all()
    assert c is None or not c[1].any()
    others = [0, 3, 4]
    alone, alone_scale, _ = launch(
        x[others], p, None, spec, container=container, appended=appended, bias=appended
    )
    assert torch.equal(codes.float()[others], alone.float())
    assert torch.equal(scale[others], alone_scale)


@every_scale
def test_denormal_floats_are_zero(spec):
    """1e-40 of a float32: reached through z, whose input stays in bf16."""
    x = torch.full((3, 160), 1e-40, device=DEVICE).bfloat16()
    codes, scale, _ = launch(
        x, torch.zeros(160, 8, device=DEVICE).bfloat16(), None, spec, container=INT8
    )
    assert not codes.any()
    assert (scale.abs() < 1e-30).all()


@every_scale
def test_one_huge_outlier(spec):
    x, p, _ = close_case(spec, 3)
    x[1, 77] = 6e4
    assert_close(spec, x[:1], p, None, flips=0.3)
    codes, scale, c = launch(x, p, None, spec, container=INT8)
    want_z, want_c = transform(x.double(), p.double(), None, spec)
    z = from_permuted(codes, 160).double().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    steps = scale[1].max() * (16 if spec.activations.name == "pow2" else 1)
    assert (z.flatten(1) - want_z)[1].abs().max() < 0.8 * steps + 2.0**-9 * 6e4
    torch.testing.assert_close(c.double(), want_c, rtol=2e-3, atol=1)


@every_scale
def test_rows_inside_the_protected_span_leave_almost_nothing(spec):
    _, p, _ = close_case(spec, 3)
    c = torch.randn(3, 8, device=DEVICE)
    x = (c @ p.float().T).half()
    codes, scale, got = launch(x, p, None, spec, container=INT8)
    z = from_permuted(codes, 160).double().unflatten(1, (scale.shape[1], -1)) * scale[..., None]
    assert z.abs().max() < 0.02 * x.abs().max()
    assert ((got.float() - c).abs() <= 0.01 * c.norm(dim=1, keepdim=True)).all()


@every_scale
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_numbers_show_in_their_row_only(spec, bad):
    x, p, _ = close_case(spec, 4)
    want, want_scale, _ = launch(x, p, None, spec, container=INT8)
    x[2, 100] = bad
    codes, scale, c = launch(x, p, None, spec, container=INT8)
    assert not scale[2].isfinite().all() or not c[2].isfinite().all()
    others = [0, 1, 3]
    assert torch.equal(codes[others], want[others])
    assert torch.equal(scale[others], want_scale[others])


def test_a_block_transform_of_ones_is_one_value():
    """The order of the columns, seen through the transform itself."""
    spec = tiny_spec(dim=128, block=64)
    x = torch.eye(128, device=DEVICE).half()
    codes, scale, _ = launch(x, None, None, spec, container=INT8)
    got = from_permuted(codes, 128).float() * scale
    torch.testing.assert_close(got, block_hadamard(torch.eye(128, device=DEVICE), 64))


def test_no_rows():
    codes, scale, c = launch(
        torch.zeros(0, 160, device=DEVICE).half(),
        torch.zeros(160, 8, device=DEVICE).bfloat16(),
        None,
        SCALES["pow2"],
        container=INT8,
    )
    assert codes.shape == (0, 192)
    assert scale.shape == (0, 1)
    assert c is not None and c.shape == (0, 8)


def test_builds_name_every_argument():
    for build in builds():
        assert set(build.signature) | set(build.constants) == set(build.kernel.arg_names), (
            build.name
        )
        assert set(build.aligned) <= set(build.signature), build.name
    names = [(build.name, chip) for build in builds() for chip in build.chips]
    assert len(set(names)) == len(names)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bad_numbers_show_in_groups_of_several_blocks():
    spec = tiny_spec(dim=256, block=64, act_scale="group", act_group=128)
    x = torch.randn(3, 256, device=DEVICE).half()
    x[1, 5] = torch.nan
    assert launch(x, None, None, spec, container=INT8)[1][1].isnan().any()
