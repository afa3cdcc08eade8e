"""The least that a forward of FLUX.1 takes on this chip: ceilings, each measured in this run."""

import functools
from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from dirotq.benchmarks.flux_rows import FLOOR, Row
from dirotq.benchmarks.flux_work import Work
from dirotq.benchmarks.gpu_timing import copies, time_calls
from dirotq.benchmarks.speed_rows import bandwidth

GEMM, AS_SHAPED, ATTENTION, BYTES = "GEMM", "GEMM, as shaped", "attention", "bytes"


def floors(work: Work, case: str) -> Iterator[Row]:
    """Milliseconds of products, attention and bytes, and the rates behind them.

    ``GEMM`` is the arithmetic of the original linears at the best rate that ``torch._scaled_mm``
    reached on any of their shapes; ``GEMM, as shaped`` is what their real shapes take, the
    protected branch's columns included.
    """

    def row(section: str, what: str, value: float, note: str = "") -> Row:
        return Row(section=section, case=case, contestant=FLOOR, what=what, value=value, note=note)

    best, shaped = 0.0, 0.0
    for (m, k, n), count in work.shapes.items():
        us = product_us(m, k, n)
        best = max(best, 2e-6 * m * k * n / us)
        shaped += count * us / 1e3
        yield row("rate", f"{m} x {k} -> {n}", 2e-6 * m * k * n / us, f"TFLOP/s, {us:.1f} us")
    yield row("floor", GEMM, work.linear_flops / best / 1e9, f"at {best:.0f} TFLOP/s")
    yield row("floor", AS_SHAPED, shaped)
    us = attention_us(work.attention)
    rate = work.attention_flops / work.attentions / us / 1e6
    yield row("floor", ATTENTION, work.attentions * us / 1e3, f"at {rate:.0f} TFLOP/s")
    speed = bandwidth()
    ms = work.least_bytes / speed * 1e3
    yield row("floor", BYTES, ms, f"{work.least_bytes / 1e9:.1f} GB at {speed / 1e12:.2f} TB/s")


def product_us(m: int, k: int, n: int) -> float:
    """Microseconds of one FP8 product with a scale per row and per column."""

    def make() -> functools.partial:
        left, right = (
            torch.randint(-7, 8, shape, device="cuda").to(torch.float8_e4m3fn)
            for shape in ((m, k), (n, k))
        )
        return functools.partial(
            torch._scaled_mm, left, right.t(), out_dtype=torch.bfloat16, use_fast_accum=True,
            scale_a=torch.ones(m, 1, device="cuda"), scale_b=torch.ones(1, n, device="cuda"),
        )  # fmt: skip

    return time_calls([make() for _ in range(copies(m * k + n * k))]).p50


def attention_us(shape: tuple[int, int, int, int]) -> float:
    """Microseconds of one exact attention over [B, heads, T, channels] in bf16."""
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return time_calls([lambda: scaled_dot_product_attention(q, k, v)] * 4).p50
