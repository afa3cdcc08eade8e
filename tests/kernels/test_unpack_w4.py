"""The Triton ``unpack_w4`` against its specification.

Triton's interpreter loses the carry when rounding to FP8 reaches the next power of two: 1.97
becomes 1 instead of 2. Codes and ``high`` are exact before the conversion; ``low`` is not.
"""

import pytest
import torch
from formats import DEVICE

pytest.importorskip("triton")

from dirotq.kernels.appended import appended_part, columns_with_appended
from dirotq.kernels.buffers import Packed
from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.formats.quantize_weight import unpack_codes
from dirotq.kernels.permuted import from_permuted, padded
from dirotq.kernels.unpack_w4 import unpack_w4
from dirotq.kernels.unpack_w4.kernel import allocate, builds
from dirotq.kernels.unpack_w4.kernel import launch as launch_packed

INT8, FP8 = torch.int8, torch.float8_e4m3fn
containers = pytest.mark.parametrize("container", [INT8, FP8], ids=["int8", "fp8"])
elements = pytest.mark.parametrize("element", ["int4", "lm4"])


def qweight(rows: int, width: int) -> torch.Tensor:
    torch.manual_seed(rows + width)
    return pack_int4(torch.randint(-8, 8, (rows, width), dtype=INT8)).to(DEVICE)


def extras(rows: int, rank: int, bias: bool):
    torch.manual_seed(rank)
    wscale = torch.exp(torch.randn(rows, 1)).bfloat16()
    wp = (torch.randn(rows, rank) * 30 * wscale).bfloat16() if rank else None
    beta = (torch.randn(rows) * 100 * wscale[:, 0]).bfloat16() if bias else None
    return tuple(None if t is None else t.to(DEVICE) for t in (wscale, wp, beta))


def launch(q, container, wscale=None, wp=None, bias=None, **more):
    packed = Packed(q, wscale, wp=wp, bias=bias)
    return launch_packed(packed, container, appended=wscale is not None, **more)


def raw(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8)


@containers
@pytest.mark.parametrize(
    ("element", "rows", "width", "per_program"),
    [
        *(
            ("int4", *size, per_program)
            for size in ((1, 64), (5, 128), (3, 352), (40, 160), (7, 8)) for per_program in (4, 128)
        ),
        # Ragged rows too: what follows their last column must be no level.
        ("lm4", 5, 128, 4), ("lm4", 3, 352, 128), ("lm4", 7, 8, 128),
    ],
)  # fmt: skip
def test_codes_are_exact(container, element, rows, width, per_program, empty_is):
    q = qweight(rows, width)
    want = unpack_w4(q, container, element=element)
    for byte in (255, 0):
        with empty_is(byte):
            got, scale = launch(q, container, element=element, blocks_per_program=per_program)
        assert scale is None
        assert got.shape == (rows, padded(width))
        assert torch.equal(raw(got), raw(want))


@containers
@elements
def test_every_code_at_every_place(container, element):
    columns, codes = torch.arange(128), torch.arange(-8, 8, dtype=INT8)
    q = pack_int4(codes[(columns[None] + columns[:16, None]) % 16]).to(DEVICE)
    got, _ = launch(q, container, element=element)
    values = got.float() * (512 if container == FP8 else 1)
    assert torch.equal(from_permuted(values, 128), unpack_codes(q, element).float())


@pytest.mark.parametrize(
    ("rank", "bias"), [(0, True), (8, False), (24, True), (64, True), (64, False), (0, False)]
)
@pytest.mark.parametrize(("rows", "width"), [(5, 128), (33, 160)])
def test_appended_columns(rank, bias, rows, width, empty_is):
    q, (wscale, wp, beta) = qweight(rows, width), extras(rows, rank, bias)
    want = unpack_w4(q, FP8, wscale, wp, beta)
    for byte in (255, 0):
        with empty_is(byte):
            got, scale = launch(q, FP8, wscale, wp, beta)
        assert got.shape == (rows, columns_with_appended(width, rank, bias))
        assert torch.equal(scale, wscale.float().T)
        behind, part = padded(width), appended_part(rank, bias)
        assert torch.equal(raw(got)[:, :behind], raw(want)[:, :behind])
        assert torch.equal(raw(got)[:, behind + 3 * part :], raw(want)[:, behind + 3 * part :])
        high, again, low = got[:, behind : behind + 3 * part].float().tensor_split(3, 1)
        want_high, _, want_low = want[:, behind : behind + 3 * part].float().tensor_split(3, 1)
        assert torch.equal(high, again)
        # The kernel multiplies by a reciprocal: a tie may fall to the other side, and low with it.
        same = high == want_high
        assert (~same).sum() <= 0.01 * same.numel()
        value = want_high + want_low
        assert ((high + low - value).abs()[~same] <= 2.0**-7 * value.abs()[~same]).all()
        lost = torch.full_like(low, DEVICE.type == "cpu") * want_low.abs() / 2
        step = want_low.abs() / 8 + 2.0**-9
        assert ((low - want_low).abs() <= torch.maximum(lost, step))[same].all()
        assert (low != want_low).sum() <= 0.1 * low.numel()


def test_outputs_without_a_scale_have_nothing_appended():
    q, (wscale, wp, beta) = qweight(5, 64), extras(5, 8, True)
    wscale[2] = 0
    got, _ = launch(q, FP8, wscale, wp, beta)
    assert not got.float()[2, 64:].any()
    assert got.float().isfinite().all()


def test_rows_of_a_shared_site():
    q, (wscale, wp, beta) = qweight(40, 128), extras(40, 8, True)
    whole, scale = launch(q, FP8, wscale, wp, beta)
    part, part_scale = launch(q[7:30], FP8, wscale[7:30], wp[7:30], beta[7:30])
    assert torch.equal(raw(part), raw(whole[7:30]))
    assert torch.equal(part_scale, scale[:, 7:30])


def test_appended_columns_of_exact_values_are_exact():
    """Multiples of the scale: nothing is rounded but in the split itself."""
    q, wscale = qweight(8, 64), torch.full((8, 1), 0.25).bfloat16().to(DEVICE)
    wp = (torch.arange(-64, 64).reshape(8, 16) / 2).bfloat16().to(DEVICE)
    beta = torch.arange(-40.0, 40.0, 10).bfloat16().to(DEVICE)
    got, _ = launch(q, FP8, wscale, wp, beta)
    assert torch.equal(got.float(), unpack_w4(q, FP8, wscale, wp, beta).float())


@containers
def test_memory_may_be_given(container):
    q = qweight(5, 128)
    given = allocate(Packed(q, None), container)
    got, _ = launch(q, container, out=given)
    assert got is given[0]
    assert torch.equal(raw(got), raw(unpack_w4(q, container)))


def test_builds_name_every_argument():
    for build in builds():
        assert set(build.signature) | set(build.constants) == set(build.kernel.arg_names)
        assert set(build.aligned) <= set(build.signature), build.name
    assert len({b.name for b in builds()}) == len(builds())
