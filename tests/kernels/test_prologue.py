"""Sources read by the Triton passes against what the network computes without fusion; interpreted
where there is no GPU. Inputs are fp16 (bf16 is wrong in the interpreter)."""

from dataclasses import replace

import pytest
import torch
from formats import DEVICE
from tiny_spec import tiny_spec
from torch import Tensor

pytest.importorskip("triton")

from dirotq.kernels.appended import BIAS_COEFFICIENT, appended_part, columns_with_appended
from dirotq.kernels.permuted import from_permuted, padded
from dirotq.kernels.prologue import SHORT, Prologue, concat_gelu, gelu, plain
from dirotq.kernels.transform_quantize import MAX_DIRECTIONS, kernel, quantize_rows, transform
from dirotq.kernels.transform_quantize.kernel import MAX_RANK, launch, usual

SPECS = {
    "even": tiny_spec(dim=512, block=128, rank=24, act_scale="pow2"),
    "ragged": tiny_spec(dim=352, block=32, rank=8, act_scale="pow2"),
    "rms": tiny_spec(dim=512, block=256, rank=24, act_scale="rms"),
    "rms-ragged": tiny_spec(dim=352, block=32, rank=8, act_scale="rms", act_group=32),
    "rms-64": tiny_spec(dim=512, block=512, rank=24, act_scale="rms", act_group=64),
    "rms-128": tiny_spec(dim=512, block=256, rank=24, act_scale="rms", act_group=128),
    "rms-0": tiny_spec(dim=256, block=16, act_scale="rms"),
    "floats": tiny_spec(dim=512, block=256, rank=24, act_bits=8, act_scale="rms"),
    "floats-0": tiny_spec(dim=352, block=32, act_bits=8, act_scale="rms"),
    "w4a8": tiny_spec(dim=256, block=64, rank=16, act_bits=8),
    "rank-0": tiny_spec(dim=256, block=64, act_scale="pow2"),
    "rank-beyond": tiny_spec(dim=512, block=64, rank=MAX_RANK + 8),
}
BEHIND = {"even": 256, "ragged": 96, "w4a8": 128, "rank-0": 128, "rank-beyond": 256}
BEHIND |= {"rms": 256, "rms-ragged": 96, "rms-64": 256, "rms-128": 256, "rms-0": 128}
BEHIND |= {"floats": 256, "floats-0": 96}
KINDS = ("plain", "gelu", "concat")
# Every kind at a site of each scale and at a ragged one; every other site with one kind.
FULL = ("even", "ragged", "rms", "rms-ragged", "floats")
CASES = [(kind, name) for name in FULL for kind in KINDS]
CASES += [(KINDS[i % 3], name) for i, name in enumerate(n for n in SPECS if n not in FULL)]


def prologue_of(kind: str, name: str, images: int = 3, tokens: int = 19) -> Prologue:
    """Of x with outliers and a mean, as slices of longer rows and longer sequences."""
    g = torch.Generator().manual_seed(0)
    d, behind = SPECS[name].in_features, BEHIND[name]

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).half().to(DEVICE)

    x = draw(images, tokens + 5, d + 8)[:, 2 : 2 + tokens, :d]
    if kind == "gelu":
        return gelu(x * 2)
    if kind == "concat":
        wide = draw(images, tokens, behind + 16)
        return concat_gelu(x[..., : d - behind], wide[..., 16:])
    return plain(x)


def basis_of(name: str) -> Tensor | None:
    spec, g = SPECS[name], torch.Generator().manual_seed(1)
    vectors = torch.linalg.qr(torch.randn(spec.in_features, spec.in_features, generator=g)).Q
    return vectors[:, : spec.rank].contiguous().bfloat16().to(DEVICE) if spec.rank else None


def double(prologue: Prologue) -> Prologue:
    names = ("x_BTD", "behind_BTF")
    found = {n: t.double() for n in names if (t := getattr(prologue, n)) is not None}
    return replace(prologue, **found)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_codes_are_as_good_as_without_fusion(kind, name):
    spec, prologue, p = SPECS[name], prologue_of(kind, name), basis_of(name)
    rows = double(prologue).value().reshape(prologue.rows, spec.in_features)
    z, c = transform(rows, None if p is None else p.double(), None, spec)

    def errors(x: Tensor | Prologue) -> tuple[float, float]:
        container = torch.float8_e4m3fn if spec.activations.element == "e4m3" else torch.int8
        codes, scale, got_c = launch(x, p, None, spec, container=container)
        assert not codes.float().isnan().any()
        got = from_permuted(codes.float(), spec.width).double() * scale.double()
        off = 0.0 if c is None or got_c is None else (got_c.double() - c).norm() / c.norm()
        return float((got - z).norm() / z.norm()), float(off)

    plain_z, plain_c = errors(prologue.value().reshape(prologue.rows, spec.in_features))
    fused_z, fused_c = errors(prologue)
    exact_codes, exact_scale = quantize_rows(z, spec)
    floor = float((exact_codes.double() * exact_scale.double() - z).norm() / z.norm())
    assert fused_z <= 1.05 * max(plain_z, floor)
    assert fused_c <= 2 * plain_c


@pytest.mark.parametrize("chip", [80, 100])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("plain", "even"), ("gelu", "rms"), ("concat", "rms-ragged"), ("plain", "rank-0")],
)
def test_other_chips_take_other_ways_to_the_same_codes(kind, name, chip, monkeypatch):
    spec, prologue, p = SPECS[name], prologue_of(kind, name), basis_of(name)
    shapes = usual(kind, chip)
    assert shapes.rotate.stacked != usual(kind, 90).rotate.stacked
    want, want_scale, _ = launch(prologue, p, None, spec, container=torch.int8)
    monkeypatch.setattr(kernel, "usual", lambda *_: shapes)
    codes, scale, _ = launch(prologue, p, None, spec, container=torch.int8)
    assert torch.allclose(scale, want_scale, rtol=1e-3)
    assert (codes == want).double().mean() > 0.99  # the rest lies near ties
    apart = codes.float() * scale - want.float() * want_scale
    assert apart.norm() < 0.03 * (want.float() * want_scale).norm()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_neighbours(kind):
    tokens = 19
    spec, p = SPECS["even"], basis_of("even")
    prologue = prologue_of(kind, "even", tokens=tokens)
    whole = launch(prologue, p, None, spec, container=torch.int8)

    def image(i: int) -> Prologue:
        parts = ("x_BTD", "behind_BTF")
        own = {n: t[i : i + 1] for n in parts if (t := getattr(prologue, n)) is not None}
        return replace(prologue, **own)

    for i in range(3):
        part = launch(image(i), p, None, spec, container=torch.int8)
        for got, want in zip(part, whole, strict=True):
            assert got is not None and want is not None
            want = want[tokens * i : tokens * (i + 1)].float()
            # numpy, which interprets, may compute the last bit of exp by where a value lies.
            close = torch.isclose(got.float(), want, rtol=1e-3, atol=1e-6)
            assert close.double().mean() > (0.999999 if got.is_cuda else 0.995)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", ["rms", "rms-ragged", "rms-64", "rms-128", "rms-0", "floats"])
def test_the_columns_appended_behind_scales_of_the_root_mean_square(name, bias, empty_is):
    """Codes, coefficients and the bias's direction: what the product makes of them is right."""
    spec, prologue, p = SPECS[name], prologue_of("gelu", name), basis_of(name)
    rows = double(prologue).value().reshape(prologue.rows, spec.in_features)
    z, c = transform(rows, None if p is None else p.double(), None, spec)
    with empty_is(255):
        codes, scale, none = launch(
            prologue, p, None, spec, container=torch.float8_e4m3fn, appended=True, bias=bias
        )
    assert none is None
    assert codes.shape[1] == columns_with_appended(spec.width, spec.rank, bias)
    main, behind = padded(spec.width), appended_part(spec.rank, bias)
    got = from_permuted(codes.float()[:, :main], spec.width).double() * scale.double() / 512
    want, step = quantize_rows(z, spec)
    floor = (want.double() * step.double() - z).norm()
    assert (got - z).norm() <= 1.05 * floor
    high, low, again = codes.float()[:, main : main + 3 * behind].tensor_split(3, 1)
    assert torch.equal(high, again)
    assert not codes.float()[:, main + 3 * behind :].any()
    directions = (high + low).double() * scale.double() / 2
    if c is not None:
        # Two E4M3 numbers hold a coefficient to 2^-8, or to 0.001 of 4 steps of the row's top.
        off, rms = directions[:, : spec.rank] - c, z.square().mean().sqrt()
        assert off.norm() <= 2**-7 * c.norm() + 0.015 * rms * c.numel() ** 0.5
    if bias:
        off = (directions[:, spec.rank] - BIAS_COEFFICIENT).abs()
        assert (off <= 2**-6 + 0.015 * z.square().mean(1).sqrt()).all()


BESIDE = [("even", 8), ("rms", 8), ("rms-ragged", 8), ("floats", 8), ("rank-beyond", 8)]
BESIDE += [("rms", MAX_RANK), ("even", MAX_DIRECTIONS), ("rank-0", 8), ("rms-0", 24)]


@pytest.mark.parametrize(("name", "more"), BESIDE)
def test_directions_beside_stay_in_the_rest(name, more):
    """What an adapter reads: c has them, codes and scales are those without them."""
    spec, prologue, p = SPECS[name], prologue_of("gelu", name), basis_of(name)
    a = torch.randn(spec.in_features, more, generator=torch.Generator().manual_seed(2))
    a = (0.1 * a).bfloat16().to(DEVICE)
    container = torch.float8_e4m3fn if spec.activations.element == "e4m3" else torch.int8
    codes, scale, c = launch(prologue, p, None, spec, container=container)
    got_codes, got_scale, got_c = launch(
        prologue, a if p is None else torch.cat([p, a], 1), None,
        replace(spec, rank=spec.rank + more), container=container, beside=more,
    )  # fmt: skip
    assert got_c is not None
    # Library products round z once more; scales of a root mean square are x's and c's, or z's own.
    same_passes = p is not None and spec.rank + more <= MAX_DIRECTIONS
    equal = (got_codes.float() == codes.float()).double().mean()
    assert equal > (0.999 if same_passes else 0.99)
    torch.testing.assert_close(got_scale, scale, rtol=1e-5 if same_passes else 1e-3, atol=0)
    if c is not None:
        lead = got_c[:, : spec.rank].float()
        torch.testing.assert_close(lead, c.float(), rtol=1e-2, atol=1e-2)
    want = double(prologue).value().reshape(prologue.rows, -1) @ a.double()
    assert (got_c[:, spec.rank :] - want).norm() < 2e-3 * want.norm()


def test_rows_in_the_protected_directions_alone():
    """Nothing but rounding is left of x: scales are small, codes are not cut off."""
    spec, p = SPECS["rms"], basis_of("rms")
    assert p is not None
    x = (torch.randn(7, spec.rank, device=DEVICE) @ p.float().mT).half()
    codes, scale, c = launch(x, p, None, spec, container=torch.float8_e4m3fn)
    assert c is not None
    z, _ = transform(x.double(), p.double(), None, spec)
    got = from_permuted(codes.float(), spec.width).double() * scale.double()
    assert (got - z).norm() < 0.02 * x.double().norm()


@pytest.mark.parametrize(("tokens", "copied"), [(SHORT - 1, True), (SHORT, False)])
def test_images_of_few_rows_are_copied_where_they_do_not_lie_evenly(tokens, copied):
    x = torch.randn(tokens, 3, 32).transpose(0, 1)[..., :16]
    laid = plain(x).laid_out().x_BTD
    assert (laid.shape == (1, 3 * tokens, 16)) == copied
    assert (laid.data_ptr() == x.data_ptr()) != copied
    assert torch.equal(laid.reshape(-1, 16), x.reshape(-1, 16))


def test_values_are_what_the_network_computes():
    x = torch.randn(2, 5, 16)
    joined = concat_gelu(x, 2 * x)
    assert joined.channels == 32
    assert torch.equal(joined.value()[..., :16], x)
    assert torch.equal(joined.value()[..., 16:], gelu(2 * x).value())
