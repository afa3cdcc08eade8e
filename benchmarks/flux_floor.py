"""The least that a forward of FLUX.1 takes on this chip: work counted from shapes, at ceilings that
are measured in the same run.

Letters: T tokens, K channels, N outputs.
"""

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import diffusers
import torch
from torch.nn.functional import scaled_dot_product_attention

from dirotq.benchmarks.forward_rows import FLOOR, Row
from dirotq.benchmarks.full_size import FLUX as CONFIG
from dirotq.benchmarks.speed_rows import bandwidth
from dirotq.models.flux import FLUX
from dirotq.models.skeleton import empty_transformer
from dirotq.tuning.timing import copies, time_calls

GEMM, AS_SHAPED, ATTENTION, BYTES = "GEMM", "GEMM, as shaped", "attention", "bytes"
TEXT = 512
APPENDED, STEP = 3, 128
"""Columns of the low-rank branch per direction; what all are filled up to (docs/kernels.md)."""
RANK = 64


def floors(work: "Work", case: str) -> Iterator[Row]:
    """Milliseconds of products, attention and bytes, and the rates behind them.

    ``GEMM`` is the arithmetic of the original linears at the best rate that ``torch._scaled_mm``
    reached on any of their shapes; ``GEMM, as shaped`` is what their real shapes take, appended
    columns included.
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
    images, heads, tokens, channels = work.attention
    rate = 4e-6 * images * heads * tokens**2 * channels / us
    yield row("floor", ATTENTION, work.attentions * us / 1e3, f"at {rate:.0f} TFLOP/s")
    speed = bandwidth()
    ms = work.least_bytes / speed * 1e3
    yield row("floor", BYTES, ms, f"{work.least_bytes / 1e9:.1f} GB at {speed / 1e12:.2f} TB/s")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one forward has to compute and to move.

    ``linear_flops``  2 T K N of every linear in a block
    ``least_bytes``   beside the products' and attention's own reading: quantized activations (read
                      2, write 1), unpacked weights (read ½, write 1), modulators' 4-bit weights,
                      queries and keys (rope: read and write), residual sums
    ``shapes``        how often a product of (T, K, N) is run
    ``attention``     [B, heads, T, channels] of one attention
    """

    linear_flops: float
    least_bytes: float
    shapes: Counter[tuple[int, int, int]]
    attention: tuple[int, int, int, int]
    attentions: int


def work(side: int, batch: int = 1) -> Work:
    """Count the work of FLUX.1-dev at ``side`` x ``side`` pixels."""
    transformer = empty_transformer(CONFIG, diffusers.FluxTransformer2DModel)
    config = transformer.config
    image = (side // 16) ** 2
    flops = moved = 0.0
    shapes: Counter[tuple[int, int, int]] = Counter()
    for site in FLUX.sites(transformer):
        k, n = site.in_features, sum(site.out_features)
        if site.kind == "modulator":
            moved += 0.53 * k * n
            continue
        single = site.name.startswith("single_")
        m = batch * (image + TEXT if single else TEXT if site.text else image)
        flops += 2.0 * m * k * n
        moved += 3.0 * m * k + 1.5 * k * n
        shapes[m, columns(k), n] += 1
    blocks = config.num_layers + config.num_single_layers
    # Two gated sums per double block (attention, MLP), one per single block: read 2, 2, write 2.
    residuals = 2 * config.num_layers + config.num_single_layers
    heads, channels = config.num_attention_heads, config.attention_head_dim
    moved += batch * (image + TEXT) * heads * channels * (8.0 * blocks + 6.0 * residuals)
    return Work(
        linear_flops=flops, least_bytes=moved, shapes=shapes, attentions=blocks,
        attention=(batch, heads, image + TEXT, channels),
    )  # fmt: skip


def columns(k: int) -> int:
    """Width of the one product that computes main branch, low-rank branch and bias."""
    return -(-(k + APPENDED * (RANK + 16)) // STEP) * STEP


def product_us(m: int, k: int, n: int) -> float:
    """Time one FP8 product with a scale per row and per column, in microseconds."""

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
    """Time one exact attention over [B, heads, T, channels] in bf16, in microseconds."""
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    return time_calls([lambda: scaled_dot_product_attention(q, k, v)] * 4).p50
