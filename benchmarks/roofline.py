"""Predicted times on chips that were not measured: arithmetic and bytes over published peaks.

Efficiencies are those of one H200 (docs/kernels.md). Everything from here is a prediction, and is
marked as one wherever it is printed. Letters: M rows, K channels, N outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dirotq.benchmarks.flux_rows import COMPILED, EAGER, FUSED, PREDICTED, Row
from dirotq.benchmarks.flux_work import Work


@dataclass(frozen=True, slots=True)
class Peak:
    """Published dense peaks: TFLOP/s in bf16 with float32 sums, TOP/s of the 8-bit products that
    our codes ride in, TB/s of memory."""

    name: str
    bf16: float
    eight: float
    fp8: bool
    memory: float
    source: str


PEAKS = (
    Peak("H200", 989, 1979, True, 4.8, "NVIDIA H200 data sheet (SXM, dense)"),
    Peak("H100", 989, 1979, True, 3.35, "NVIDIA H100 data sheet (SXM, dense)"),
    Peak("L40S", 362, 733, True, 0.864, "NVIDIA L40S data sheet (dense)"),
    Peak("RTX 4090", 165.2, 330.3, True, 1.008,
         "NVIDIA Ada GPU architecture whitepaper, table of the RTX 4090 (FP8 with FP32 sums)"),
    Peak("A100", 312, 624, False, 2.039, "NVIDIA A100 data sheet (80 GB SXM, dense)"),
    Peak("RTX 3090", 71, 284, False, 0.936,
         "NVIDIA GA102 architecture whitepaper, table of the RTX 3090 (bf16 with FP32 sums)"),
)  # fmt: skip

EFFICIENCY: Mapping[str, float] = {
    # cuBLAS bf16 of FLUX's linears: 59.5 TFLOP in 76 ms of 989 TFLOP/s.
    "bf16": 0.79,
    # _scaled_mm, 4608 x 3328 -> 9216 in 182.9 us ("product alone", docs/kernels.md).
    "fp8": 0.78,
    # Triton INT8, 1.32x to 1.50x of bf16 (docs/kernels.md, "tried and lost").
    "int8": 0.57,
    # cuDNN, 24 heads x 4608 x 128 in 411 us.
    "attention": 0.64,
    # copy at 4.25 of 4.8 TB/s.
    "copy": 0.885,
    # The three sweeps of transform_quantize: 51.1 us for 3 bytes per element at 4608 x 3072.
    "transform": 0.173,
    # unpack_w4: 15.8 us for 1.5 bytes per weight at 3072 -> 9216.
    "unpack": 0.56,
}
HIDDEN = 0.55
"""Part of the unpacking that runs beside the sweeps: 7.1 of 15.8 us remain (docs/kernels.md)."""
ELEMENTWISE = {EAGER: 319e9, COMPILED: 140e9}
"""Bytes that everything but products and attention moves in bf16, per forward of FLUX.1 at 1024²:
75 and 33 ms on the H200 at copy speed."""


def times(work: Work, peak: Peak) -> dict[str, dict[str, float]]:
    """{contestant: {part: ms}} of one forward."""
    memory = peak.memory * 1e12
    share = work.elements / ELEMENTS_1024
    attention = work.attention_flops / (peak.bf16 * 1e12 * EFFICIENCY["attention"])
    products = work.linear_flops / (peak.bf16 * 1e12 * EFFICIENCY["bf16"])
    codes = "fp8" if peak.fp8 else "int8"
    found = {
        who: {
            "products": products,
            "attention": attention,
            "elementwise": share * moved / (memory * EFFICIENCY["copy"]),
        }
        for who, moved in ELEMENTWISE.items()
    }
    found[FUSED] = {
        "products": work.packed_flops / (peak.eight * 1e12 * EFFICIENCY[codes]),
        "attention": attention,
        "transform": work.transform_bytes / (memory * EFFICIENCY["transform"]),
        "unpack": (1 - HIDDEN) * work.unpack_bytes / (memory * EFFICIENCY["unpack"]),
        "elementwise": work.other_bytes / (memory * EFFICIENCY["copy"]),
        "modulators": work.modulator_bytes / (memory * EFFICIENCY["copy"]),
    }
    return {who: {k: 1e3 * v for k, v in parts.items()} for who, parts in found.items()}


ELEMENTS_1024 = 57 * 4608 * 3072
"""Elements of FLUX.1's residual stream at 1024², over all blocks: what ELEMENTWISE counts for."""


def linear_us(peak: Peak, m: int, k: int, n: int) -> float:
    """Microseconds of one packed linear of rank 64, the sum that docs/kernels.md measured."""
    work = Work.of_linear(m, k, n)
    memory = peak.memory * 1e6
    codes = "fp8" if peak.fp8 else "int8"
    return (
        work.packed_flops / (peak.eight * 1e6 * EFFICIENCY[codes])
        + work.transform_bytes / (memory * EFFICIENCY["transform"])
        + (1 - HIDDEN) * work.unpack_bytes / (memory * EFFICIENCY["unpack"])
    )


def rows(work: Work, case: str, peaks: Sequence[Peak] = PEAKS) -> list[Row]:
    """A row per chip, contestant and part, and one for the sum; all marked as predicted."""
    return [
        Row(
            section="roofline", case=case, contestant=who, what=f"{peak.name}: {part}",
            value=value, note=PREDICTED, run=PREDICTED,
        )
        for peak in peaks
        for who, parts in times(work, peak).items()
        for part, value in ({"all": sum(parts.values())} | parts).items()
    ]  # fmt: skip
