"""Second moments and GPTQ on a real GPU, at the sizes of FLUX.1-dev, against float64.

As everywhere, an error must be below twice that of plain torch in the same dtype on the same GPU.
Times and peaks of memory are printed; only memory is held.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from dirotq.kernels import gptq as op
from dirotq.kernels import second_moment
from dirotq.kernels.chip import capability
from dirotq.kernels.formats.quantize_weight import weight_scales, weight_steps
from dirotq.kernels.formats.weight import Element
from dirotq.kernels.gptq import gptq, reference
from dirotq.kernels.second_moment.kernel import TILES, launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("full_float32"),
]

DEVICE = torch.device("cuda")
HERE = [c for c in TILES if torch.cuda.is_available() and capability(DEVICE) in c.chips]
ON = pytest.mark.parametrize("config", HERE, ids=lambda c: "tma" if c.tma else "pointers")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
SITES = [(3072, 9216), (3072, 21504), (12288, 3072), (15360, 3072)]
"""Columns and outputs."""
GIB = 2**30


def activations(tokens: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows whose channels differ in size and follow each other."""
    generator = torch.Generator(DEVICE).manual_seed(tokens + dim)
    x = torch.randn(tokens, dim, device=DEVICE, generator=generator)
    x *= torch.logspace(1, -1, dim, device=DEVICE)
    return (x + x.roll(1, 1)).to(dtype)


def milliseconds(call, times: int = 5) -> float:
    call()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / times


@ON
@HALVES
@pytest.mark.parametrize(("tokens", "dim"), [(4608, 3072), (777, 2240), (100, 1000), (600, 15360)])
def test_second_moments_are_as_good_as_the_librarys(config, tokens, dim, dtype):
    x = activations(tokens, dim, dtype)
    total = second_moment.new(dim, DEVICE)
    for _ in range(2):
        launch(total, x, tile=config)
    got = second_moment.unpack(total, dim).double() / 2
    plain = torch.mm(x.mT, x, out_dtype=torch.float32).double()
    want = x.double().mT @ x.double()
    ours, torchs = (float((s - want).norm() / want.norm()) for s in (got, plain))
    assert ours < 2 * torchs, f"relative error {ours:.2e}, plain torch {torchs:.2e}"


@ON
def test_second_moments_do_not_depend_on_timing(config):
    x = activations(1000, 5600)
    totals = [second_moment.new(5600, DEVICE) for _ in range(3)]
    for total in totals:
        launch(total, x, tile=config)
    assert all(torch.equal(totals[0], total) for total in totals)


@pytest.mark.parametrize("stride", [3072, 3080, 3073])
def test_accumulate_takes_rows_as_they_lie(stride):
    """Rows at multiples of 16 bytes and others: descriptors or pointers, as it finds."""
    wide = torch.full((300, stride), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    x = wide[:, :3072]
    x.copy_(torch.randint(-8, 9, x.shape, device=DEVICE))
    total = second_moment.new(3072, DEVICE)
    second_moment.accumulate(total, x)
    assert torch.equal(second_moment.unpack(total, 3072).double(), x.double().mT @ x.double())


def test_float32_activations_are_not_rounded():
    torch.set_float32_matmul_precision("high")
    x = activations(500, 3072, torch.float32)
    total = second_moment.new(3072, DEVICE)
    second_moment.accumulate(total, x)
    want = x.double().mT @ x.double()
    error = (second_moment.unpack(total, 3072).double() - want).norm() / want.norm()
    assert float(error) < 1e-6


@pytest.mark.parametrize("dim", [3072, 12288, 15360])
def test_time_of_second_moments(dim, capsys):
    x, total = activations(4608, dim), second_moment.new(dim, DEVICE)
    ours = milliseconds(lambda: second_moment.accumulate(total, x))
    torchs = milliseconds(lambda: x.mT @ x)
    rate = 2e-9 * 4608 * dim**2 / ours  # of the whole product, half of which is not computed
    with capsys.disabled():
        print(
            f"\nsecond moment of 4608 x {dim}: {ours:.2f} ms, as if {rate:.0f} TFLOP/s;"
            f" plain bf16 product {torchs:.2f} ms",
            end=" ",
        )


def site(
    columns: int, outputs: int, groups: int = 1, element: Element = "int4"
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a second moment in float64 and steps."""
    total = second_moment.new(columns, DEVICE)
    for seed in range(3):
        second_moment.accumulate(total, activations(4608 + seed, columns))
    s = second_moment.unpack(total, columns).double() / (3 * 4608)
    w = torch.randn(outputs, columns, device=DEVICE)
    read = s.diagonal()
    scale = weight_scales(w, groups, clip=True, importance_K=read, element=element)
    return w, s, weight_steps(scale, None, element)


@pytest.mark.parametrize("element", ["int4", "lm4"])
@pytest.mark.parametrize(
    ("columns", "outputs", "groups"), [(3072, 1024, 1), (3072, 500, 48), (2240, 77, 1)]
)
def test_gptq_finds_the_codes_of_float64(columns, outputs, groups, element):
    w, s, scale = site(columns, outputs, groups, element)
    want, _ = gptq(w.double(), s, scale, damping=0.01, element=element)
    plain, _ = reference.gptq(w, s, scale, damping=0.01, element=element)
    codes, counts = gptq(w, s, scale, damping=0.01, element=element)
    assert op._sweep(w, element) is not reference.sweep
    ours, torchs = (float((q != want).double().mean()) for q in (codes, plain))
    assert ours < 2 * torchs + 1e-4, f"{ours:.2e} of the codes differ, plain torch {torchs:.2e}"
    assert counts["escalations"] == 0


@pytest.mark.parametrize(("columns", "outputs"), SITES)
def test_a_site_fits_into_20_gib(columns, outputs, capsys):
    w, s, _ = site(columns, outputs)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()

    def quantized() -> None:
        scale = weight_scales(w, 1, clip=True, importance_K=s.diagonal())
        gptq(w, s, scale, damping=0.01)

    quantized()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    taken = milliseconds(quantized, times=1)
    factored = milliseconds(lambda: torch.linalg.cholesky_ex(s + torch.eye(columns, device=DEVICE)))
    with capsys.disabled():
        print(
            f"\nGPTQ {columns} -> {outputs}: {taken:.0f} ms, of which one Cholesky {factored:.0f};"
            f" peak {peak / GIB:.1f} GiB, reserved {reserved / GIB:.1f} GiB",
            end=" ",
        )
    assert peak < 20 * GIB
