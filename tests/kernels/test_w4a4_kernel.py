"""The Triton engine of w4a4_linear against its specification, on the CPU's interpreter.

Scales that are powers of two keep every sum exact in float32, so most comparisons are for equality.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dirotq.kernels.buffers import Codes, Packed
from dirotq.kernels.build import FP8_CHIPS
from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.formats.quantize_weight import unpack_codes
from dirotq.kernels.permuted import padded, to_permuted
from dirotq.kernels.w4a4_linear import kernel as engine
from dirotq.kernels.w4a4_linear import w4a4_linear
from dirotq.kernels.w4a4_linear.kernel import builds, launch
from dirotq.kernels.w4a4_linear.tiles import TILES, Tile, fits, scales_fit

SMALL = Tile(bm=16, bn=32, bk=64, warps=4, stages=2, group_m=2)
WIDE = Tile(bm=32, bn=16, bk=128, warps=4, stages=2, group_m=2)
TMA = Tile(bm=16, bn=32, bk=128, warps=4, stages=2, group_m=2, tma=True)
INT8, FP8 = torch.int8, torch.float8_e4m3fn
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def powers_of_two(*shape: int) -> Tensor:
    return torch.exp2(torch.randint(-3, 3, shape).float())


def operands(M, N, K, *, act_groups=1, weight_groups=1, R=0, bias=False, c_dtype=torch.float16):
    """Arguments of the specification: exact main term, random 16-bit extras."""
    torch.manual_seed(M * 1000 + N * 10 + K + R)
    q_MK = torch.randint(-7, 8, (M, K))
    codes_MK = (q_MK * 2 ** torch.randint(0, 5, (M, K))).to(INT8)  # exact in E4M3 too
    weight_NK = torch.randint(-8, 8, (N, K)).to(INT8)
    return {
        "codes_MK": codes_MK.to(DEVICE),
        "scale_MG": powers_of_two(M, act_groups).to(DEVICE),
        "c_MR": torch.randn(M, R).to(c_dtype).to(DEVICE) if R else None,
        "qweight_NK2": pack_int4(weight_NK).to(DEVICE),
        "wscale_NG": powers_of_two(N, weight_groups).to(torch.bfloat16).to(DEVICE),
        "wp_NR": torch.randn(N, R).to(torch.bfloat16).to(DEVICE) if R else None,
        "bias_N": torch.randn(N).to(torch.bfloat16).to(DEVICE) if bias else None,
    }


def unpacked(qweight_NK2: Tensor, container: torch.dtype, element: str = "int4") -> Tensor:
    """What ``unpack_w4`` leaves in the workspace."""
    weight_NK = to_permuted(unpack_codes(qweight_NK2, element))
    return weight_NK if container == INT8 else (weight_NK.float() * 2.0**-9).to(FP8)


def run(args, *, container=INT8, tile=SMALL, from_packed=True, out_dtype=torch.float32, **more):
    """Launch on a NaN-filled output."""
    codes_MK, qweight_NK2 = args["codes_MK"], args["qweight_NK2"]
    shape = codes_MK.shape[0], qweight_NK2.shape[0]
    more.setdefault("out", torch.full(shape, torch.nan, dtype=out_dtype, device=DEVICE))
    return launch(
        Codes(to_permuted(codes_MK).to(container), args["scale_MG"], args["c_MR"]),
        packed_of(args),
        None if from_packed else unpacked(qweight_NK2, container, args.get("element", "int4")),
        width=codes_MK.shape[1],
        out_dtype=out_dtype,
        tile=tile,
        element=args.get("element", "int4"),
        **more,
    )


def packed_of(args) -> Packed:
    """Buffers of a linear from the arguments of the specification."""
    return Packed(args["qweight_NK2"], args["wscale_NG"], wp=args["wp_NR"], bias=args["bias_N"])


containers = pytest.mark.parametrize("container", [INT8, FP8], ids=["int8", "fp8"])
sources = pytest.mark.parametrize("from_packed", [True, False], ids=["packed", "unpacked"])


@containers
@sources
@pytest.mark.parametrize("tile", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [(1, 40, 64), (7, 72, 96), (33, 40, 160), (33, 72, 192), (16, 32, 256), (2, 3, 8), (3, 5, 72)],
)
def test_main_term_is_exact(container, from_packed, tile, M, N, K):
    args = operands(M, N, K)
    got = run(args, container=container, tile=tile, from_packed=from_packed)
    assert torch.equal(got, w4a4_linear(**args))


@containers
@sources
@pytest.mark.parametrize(
    ("M", "N", "K", "groups"), [(7, 72, 96, 1), (3, 5, 72, 1), (7, 40, 128, 2)]
)
def test_levels_are_exact(container, from_packed, M, N, K, groups):
    """Columns past the last one must stay nothing: there is no zero among the levels."""
    args = operands(M, N, K, act_groups=groups, weight_groups=groups) | {"element": "lm4"}
    args["qweight_NK2"] = torch.randint(256, (N, K // 2), dtype=torch.uint8).to(DEVICE)
    got = run(args, container=container, tile=WIDE, from_packed=from_packed)
    want = w4a4_linear(**args)
    if groups == 1:
        assert torch.equal(got, want)
    else:  # of groups, float32 holds each, not the sum of all
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@containers
@sources
@pytest.mark.parametrize(
    ("K", "act_groups", "weight_groups"),
    [(256, 4, 1), (256, 1, 4), (256, 4, 2), (256, 2, 2), (192, 3, 3), (192, 1, 1), (384, 2, 3)],
)
def test_group_scales_are_exact(container, from_packed, K, act_groups, weight_groups):
    args = operands(7, 40, K, act_groups=act_groups, weight_groups=weight_groups)
    got = run(args, container=container, tile=WIDE, from_packed=from_packed)
    assert torch.equal(got, w4a4_linear(**args))


@sources
@pytest.mark.parametrize("R", [8, 16, 24, 72])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("c_dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_protected_branch_and_bias(from_packed, R, bias, c_dtype):
    args = operands(7, 40, 96, R=R, bias=bias, c_dtype=c_dtype)
    want = w4a4_linear(**args)
    got = run(args, from_packed=from_packed)
    # float32 against float32: only the order of the sum differs.
    torch.testing.assert_close(got, want, rtol=0, atol=2e-7 * float(want.abs().max()) * 4)


@sources
def test_bias_alone(from_packed):
    args = operands(5, 40, 64, bias=True)
    args["bias_N"] = args["bias_N"].float().round().to(torch.bfloat16)
    assert torch.equal(run(args, from_packed=from_packed), w4a4_linear(**args))


@containers
@sources
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_codes_everywhere(container, from_packed, sign):
    args = operands(3, 40, 256)
    args["codes_MK"] = torch.full_like(args["codes_MK"], 112 * sign)
    args["qweight_NK2"] = pack_int4(torch.full((40, 256), -7, dtype=INT8)).to(DEVICE)
    got = run(args, container=container, from_packed=from_packed)
    exact = -7 * 112 * 256 * sign * args["scale_MG"] * args["wscale_NG"].float().mT
    assert torch.equal(got, exact)


def test_eight_bit_activations():
    args = operands(5, 40, 96)
    args["codes_MK"] = torch.randint(-127, 128, (5, 96), dtype=INT8).to(DEVICE)
    assert torch.equal(run(args), w4a4_linear(**args))


@containers
@sources
def test_zero_rows(container, from_packed):
    args = operands(7, 40, 96, bias=True)
    args["codes_MK"][[0, 6]] = 0
    args["scale_MG"][[0, 6]] = 0
    got = run(args, container=container, from_packed=from_packed)
    assert torch.equal(got[[0, 6]], args["bias_N"].float().expand(2, 40))
    assert torch.equal(got, w4a4_linear(**args))


@containers
@sources
def test_neighbouring_memory_is_neither_read_nor_written(container, from_packed):
    """Rows of wider buffers: what lies beside codes, scales, c and y must not matter."""
    args = operands(7, 40, 96, R=8)
    want = run(args, container=container, from_packed=from_packed)

    def embedded(x: Tensor, fill: float) -> Tensor:
        wide = torch.full((x.shape[0] + 2, x.shape[1] + 64), fill, device=DEVICE).to(x.dtype)
        wide[: x.shape[0], : x.shape[1]] = x
        return wide

    out = torch.full((9, 104), -5.0, device=DEVICE)
    x = Codes(
        embedded(to_permuted(args["codes_MK"]).to(container), 100)[:7],
        embedded(args["scale_MG"], torch.nan)[:7, :1],
        embedded(args["c_MR"], torch.nan)[:7, :8],
    )
    packed = Packed(
        args["qweight_NK2"],
        embedded(args["wscale_NG"], torch.nan)[:40, :1],
        wp=embedded(args["wp_NR"], torch.nan)[:40, :8],
    )
    weights = None if from_packed else embedded(unpacked(args["qweight_NK2"], container), 8)
    got = launch(x, packed, weights, width=96, out_dtype=torch.float32, tile=WIDE, out=out[:7, :40])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-4)
    assert got.data_ptr() == out.data_ptr()
    assert bool((out[7:] == -5).all()) and bool((out[:, 40:] == -5).all())


@sources
def test_rows_of_the_weight(from_packed):
    """One consumer of a shared site: a slice of the wide weight."""
    args = operands(7, 72, 96)
    whole = w4a4_linear(**args)
    part = {**args, "qweight_NK2": args["qweight_NK2"][32:], "wscale_NG": args["wscale_NG"][32:]}
    assert torch.equal(run(part, from_packed=from_packed), whole[:, 32:])


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_output_types(out_dtype):
    args = operands(7, 40, 96)
    args["scale_MG"] /= 256  # within fp16
    got = run(args, out_dtype=out_dtype, out=None)
    want = w4a4_linear(**args)
    assert got.dtype == out_dtype
    torch.testing.assert_close(got.float(), want, rtol=2**-7, atol=0)


@containers
@pytest.mark.parametrize(("M", "N", "K"), [(1, 40, 64), (33, 72, 192), (7, 48, 320)])
def test_persistent_kernel(container, M, N, K, monkeypatch):
    launched = []
    original = engine._launch_tma
    monkeypatch.setattr(engine, "_launch_tma", lambda *a: (launched.append(1), original(*a)))
    args = operands(M, N, K, R=8, bias=True)
    args["scale_MG"] /= 256
    got = run(args, container=container, tile=TMA, from_packed=False, out_dtype=torch.float16)
    assert launched == [1]
    want = w4a4_linear(**args)
    torch.testing.assert_close(got.float(), want, rtol=2**-10, atol=2e-6 * float(want.abs().max()))


@pytest.mark.parametrize("why", ["group scales", "packed weights", "float32 output", "odd outputs"])
def test_where_the_persistent_kernel_does_not_apply(why, monkeypatch):
    monkeypatch.setattr(engine, "_launch_tma", None)
    N = 41 if why == "odd outputs" else 40
    args = operands(7, N, 128, act_groups=2 if why == "group scales" else 1)
    args["scale_MG"] /= 256
    out_dtype = torch.float32 if why == "float32 output" else torch.float16
    from_packed = why == "packed weights"
    got = run(args, tile=TMA, from_packed=from_packed, out_dtype=out_dtype)
    torch.testing.assert_close(got.float(), w4a4_linear(**args), rtol=2**-10, atol=0)


def test_no_rows():
    args = operands(0, 40, 64)
    assert run(args).shape == (0, 40)


@pytest.mark.parametrize("width", [2, 66, 100])
def test_widths_that_only_unpacked_weights_may_have(width):
    args = operands(3, 5, width)
    assert torch.equal(run(args, from_packed=False), w4a4_linear(**args))
    with pytest.raises(ValueError, match="8 columns at a time"):
        run(args)


def test_scales_that_do_not_fit_are_refused():
    args = operands(3, 40, 64, act_groups=2)
    with pytest.raises(ValueError, match="multiple of 64 columns"):
        run(args)


@pytest.mark.parametrize(
    ("width", "act_groups", "weight_groups", "fit"),
    [
        (3072, 1, 1, True),
        (5600, 1, 1, True),
        (3072, 48, 48, True),
        (3072, 1, 24, True),
        (384, 2, 3, True),
        (3072, 96, 1, False),
        (3072, 1, 96, False),
        (5600, 175, 1, False),
        (128, 3, 1, False),
    ],
)
def test_scales_fit(width, act_groups, weight_groups, fit):
    assert scales_fit(width, act_groups, weight_groups) is fit


def test_large_tiles_stay_off_small_chips():
    big = Tile(bm=256, bn=128, bk=128, warps=8, stages=3)
    assert fits(big, "unpacked", 90, fp8=True)
    assert not fits(big, "unpacked", 90, fp8=False)
    assert not fits(big, "packed", 90, fp8=True)
    assert not fits(big, "packed", 80, fp8=False)
    assert not fits(TMA, "tma", 89, fp8=True)


def test_every_chip_has_a_configuration_of_every_variant():
    every = builds()
    assert len({build.name for build in every}) == len(every)
    for variant, tiles in TILES.items():
        chips = (90,) if variant == "tma" else (80, 86, 89, 90, 100, 120)
        for chip in chips:
            for fp8 in (False, True) if chip in FP8_CHIPS else (False,):
                assert any(fits(tile, variant, chip, fp8=fp8) for tile in tiles), (variant, chip)


def test_builds_name_every_argument():
    for build in builds():
        named = set(build.signature) | set(build.constants)
        assert named == set(build.kernel.arg_names), build.name
        assert not set(build.signature) & set(build.constants), build.name
        assert set(build.aligned) <= set(build.signature), build.name


def test_codes_are_padded_to_whole_blocks():
    """The tests above rely on it: a width of 96 leaves half a block of zeros."""
    assert padded(96) == 128 and to_permuted(torch.ones(1, 96)).sum() == 96
