"""The Triton ``w4a16_linear`` against its specification, in the interpreter where there is no GPU.

Interpreted, bf16 products are wrong (triton does not support them); there the activations are fp16.
"""

import pytest
import torch
from torch import Tensor

from dirotq.kernels.buffers import Packed
from dirotq.kernels.formats.lm4 import unpack_lm4
from dirotq.kernels.formats.pack_int4 import pack_int4, unpack_int4
from dirotq.kernels.w4a16_linear import w4a16_linear
from dirotq.kernels.w4a16_linear.kernel import HALVES, builds, launch
from dirotq.kernels.w4a16_linear.tiles import TILES, Tile, fits, usual

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROW = Tile(kind="row", bn=32, words=16, warps=1)
WEIGHTS = Tile(kind="dots", bm=16, bn=32, words=16, warps=4, stages=2, scale="weights")
SUMS = Tile(kind="dots", bm=16, bn=64, words=8, warps=4, stages=2, scale="sums")
KERNELS = {"row": ROW, "weights": WEIGHTS, "sums": SUMS}
every_kernel = pytest.mark.parametrize("tile", KERNELS.values(), ids=KERNELS)


def weights(N: int, K: int, group: int | None, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes -8 ... 7, scales (rows and groups differ by orders of magnitude) and a bias."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (N, K), dtype=torch.int8, generator=generator)
    groups = 1 if group is None else K // group
    scale = 0.02 * torch.exp(torch.randn(N, groups, generator=generator))
    bias = torch.randn(N, generator=generator)
    moved = (t.to(DEVICE) for t in (pack_int4(codes), scale.bfloat16(), bias.bfloat16()))
    qweight, wscale, beta = moved
    return qweight, wscale, beta


def activations(M: int, K: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def assert_close(
    got: Tensor, x: Tensor, qweight: Tensor, wscale: Tensor, bias: Tensor | None, least: int = 0
) -> None:
    """Within the rounding of every weight and of the output to x's dtype.

    A product counts as if its code were at least ``least`` in size.
    """
    assert got.dtype == x.dtype
    want = w4a16_linear(x, qweight, wscale, bias)
    products = w4a16_linear(x.abs(), magnitudes(qweight, least), wscale, None)
    limits = torch.finfo(x.dtype)
    bound = limits.eps * (0.3 * products + want.abs() + limits.smallest_normal)
    assert ((got.float() - want).abs() <= bound).all()


def magnitudes(qweight: Tensor, least: int = 0) -> Tensor:
    """|codes|, packed again; -8 counts as 7."""
    return pack_int4(unpack_int4(qweight).clamp(min=-7).abs().clamp(min=least))


@every_kernel
@pytest.mark.parametrize("K, group", [(64, 32), (96, None), (160, 32), (256, 64), (256, None)])
@pytest.mark.parametrize("M, N, bias", [(1, 40, True), (7, 96, False)])
def test_equals_the_specification(tile, M, N, K, group, bias):
    qweight, wscale, beta = weights(N, K, group)
    x, beta = activations(M, K), beta if bias else None
    out = x.new_full((M, N), float("nan"))
    got = launch(x, Packed(qweight, wscale, bias=beta), tile=tile, out=out)
    assert got is out
    assert_close(got, x, qweight, wscale, beta)


@every_kernel
@pytest.mark.parametrize("M, N, K, group", [(1, 40, 96, None), (3, 40, 160, 32), (2, 33, 256, 64)])
def test_levels_equal_the_specification(tile, M, N, K, group):
    qweight, wscale, beta = weights(N, K, group)
    x = activations(M, K)
    got = launch(x, Packed(qweight, wscale, bias=beta), tile=tile, element="lm4")
    want = w4a16_linear(x, qweight, wscale, beta, None, "lm4")
    products = w4a16_linear(x.abs(), qweight & 0x77, wscale, None, None, "lm4")
    limits = torch.finfo(x.dtype)
    bound = limits.eps * (0.3 * products + want.abs() + limits.smallest_normal)
    assert ((got.float() - want).abs() <= bound).all()


@every_kernel
def test_every_level_at_every_place(tile):
    K = 16
    columns, codes = torch.arange(K), torch.arange(-8, 8, dtype=torch.int8)
    x = torch.eye(K, dtype=torch.float16, device=DEVICE)
    q = pack_int4(codes[(columns[None, :] + columns[:16, None]) % 16])
    one = torch.ones(16, 1, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(K, 16, device=DEVICE)
    got = launch(x, Packed(q.to(DEVICE), one), tile=tile, element="lm4", out=out)
    assert torch.equal(got.T.cpu(), unpack_lm4(q).float() / 16)


@every_kernel
@pytest.mark.parametrize("M", [2, 16, 33])
def test_rows(tile, M):
    qweight, wscale, bias = weights(40, 128, 64)
    x = activations(M, 128)
    assert_close(launch(x, Packed(qweight, wscale, bias=bias), tile=tile), x, qweight, wscale, bias)


def test_usual_tiles_fit_their_chips():
    wide = TILES["wide"]
    assert all(usual(rows, chip) not in wide for rows in (1, 16, 4096) for chip in (80, 89, 120))
    assert usual(4096, 90) in wide
    assert [usual(rows, 80).kind for rows in (1, 3, 16, 17)] == ["row", "dots", "dots", "dots"]
    assert {usual(rows, 90).bm for rows in (3, 16)} == {16}


@every_kernel
def test_any_strides_and_slices_of_weights(tile):
    qweight, wscale, bias = weights(48, 128, 64)
    x = activations(3, 300)
    rows = slice(8, 48)
    qweight, wscale, bias = qweight[rows], wscale[rows], bias[rows]
    for view in (x[:, 5:133], x[:, :256:2], activations(128, 3).mT):
        assert_close(
            launch(view, Packed(qweight, wscale, bias=bias), tile=tile), view, qweight, wscale, bias
        )
    wide = x.new_full((3, 50), float("nan"))
    launch(view, Packed(qweight, wscale, bias=bias), tile=tile, out=wide[:, 4:44])
    assert_close(wide[:, 4:44], view, qweight, wscale, bias)
    assert wide[:, :4].isnan().all()
    assert wide[:, 44:].isnan().all()


@every_kernel
@pytest.mark.parametrize("group", [32, None])
def test_width_of_whole_words_only(tile, group):
    K = 32 if group else 72  # 72: nine words, rows are not whole 16 bytes
    qweight, wscale, bias = weights(16, K, group)
    x = activations(2, K)
    assert_close(launch(x, Packed(qweight, wscale, bias=bias), tile=tile), x, qweight, wscale, bias)


@every_kernel
def test_every_code_at_every_place(tile):
    K = 64
    columns, codes = torch.arange(K), torch.arange(-8, 8, dtype=torch.int8)
    x = torch.eye(K, dtype=torch.float16, device=DEVICE)
    wanted = codes[(columns[None, :] + columns[:16, None]) % 16]
    one = torch.ones(16, 1, dtype=torch.bfloat16, device=DEVICE)
    out = torch.empty(K, 16, device=DEVICE)
    got = launch(x, Packed(pack_int4(wanted).to(DEVICE), one), tile=tile, out=out)
    assert torch.equal(got.T.cpu(), wanted.float())


@every_kernel
@pytest.mark.parametrize("exponent", [-30, -14, 12])
def test_scales_beyond_the_range_of_fp16(tile, exponent):
    qweight, wscale, _ = weights(16, 256, 64)
    wscale = wscale * 2.0**exponent
    wscale[3] = 0
    wscale[4, 1:] = 0
    wscale[5, 2] *= 2.0**20
    x = activations(5, 256)
    out = torch.empty(5, 16, device=DEVICE)
    got = launch(x, Packed(qweight, wscale), tile=tile, out=out)
    want = w4a16_linear(x, qweight, wscale, None)
    top = w4a16_linear(x.abs(), magnitudes(qweight), wscale, None)
    assert ((got - want).abs() <= 1e-3 * top).all()
    assert (got[:, 3] == 0).all()


@every_kernel
def test_adversarial_rows(tile):
    qweight, wscale, _ = weights(32, 256, 64)
    x = activations(4, 256)
    x[0] = 0
    x[1] = 6e-8  # the smallest fp16
    x[2] = 1e-2
    x[2, 77] = 6e4
    got = launch(x, Packed(qweight, wscale), tile=tile)
    # One row: an outlier leaves a trace of its offset even where its code is 0.
    assert_close(got, x, qweight, wscale, None, least=1 if tile.kind == "row" else 0)
    assert (got[0] == 0).all()


def test_bf16_of_one_row():
    qweight, wscale, bias = weights(40, 160, 32)
    x = activations(2, 160, torch.bfloat16) * 1e30
    assert_close(launch(x, Packed(qweight, wscale, bias=bias), tile=ROW), x, qweight, wscale, bias)


def test_no_rows():
    qweight, wscale, bias = weights(40, 64, None)
    packed = Packed(qweight, wscale, bias=bias)
    assert launch(activations(0, 64), packed, tile=TILES["row"][0]).shape == (0, 40)


def test_what_does_not_fit_is_refused():
    assert fits(72, 1) and fits(96, 3) and fits(5600, 1)
    assert not fits(60, 1) and not fits(96, 2) and not fits(64, 4)
    qweight, wscale, _ = weights(16, 64, 16)
    with pytest.raises(ValueError, match=r"64 columns with 4 scales .* multiple of 32 columns"):
        launch(activations(1, 64), Packed(qweight, wscale), tile=TILES["row"][0])


def test_magic_numbers():
    for dtype, (magic, offset) in HALVES.items():
        halves = torch.tensor([(magic & 0xFFFF) ^ 8 ^ (code & 0xF) ^ 8 for code in range(-8, 8)])
        floats = halves.to(torch.int16).view(dtype).float() - offset
        assert floats.tolist() == list(range(-8, 8))


def test_builds_have_names_of_their_own():
    names = [build.name for build in builds()]
    assert len(set(names)) == len(names)
    used = {
        (b.constants["BN"], b.constants["W"], b.config.warps, b.config.stages) for b in builds()
    }
    tiles = [tile for group in TILES.values() for tile in group]
    assert {(t.bn, t.words, t.warps, t.stages) for t in tiles} <= used
