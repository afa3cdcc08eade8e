"""Predicted times on chips that were not measured: arithmetic and bytes over published peaks.

Efficiencies are those of FLUX.1's forward on one H100 (docs/speed.md, profile). Everything from
here is a prediction, and is marked as one wherever it is printed. Letters: M rows, K channels, N
outputs.
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
    # cuBLAS: 59.5 TFLOP in 78.5 ms of 989 TFLOP/s.
    "bf16": 0.766,
    # _scaled_mm: 62.9 TFLOP in 42.8 ms of 1979 TFLOP/s.
    "fp8": 0.743,
    # Triton INT8, 1.32x to 1.50x of bf16 (docs/kernels.md, "tried and lost").
    "int8": 0.57,
    # cuDNN: 14.9 TFLOP in 23.0 ms.
    "attention": 0.653,
    # copy at 2.94 of 3.35 TB/s.
    "copy": 0.878,
    # project, scale_rows and rotate: 15.3 GB, 3 bytes per element, in 16.65 ms.
    "transform": 0.275,
    # unpack_w4: 12.9 GB in 4.77 ms.
    "unpack": 0.808,
}
HIDDEN = 0.3
"""Part of the unpacking that runs beside the sweeps: 97.1 ms in place of 98.4 one by one."""
ELEMENTWISE = {EAGER: 219e9, COMPILED: 84e9}
"""Bytes that everything but products and attention moves in bf16, per forward of FLUX.1 at 1024²:
74 and 28 ms, as if at copy speed. An H200 takes as long, so faster memory is not all it needs."""


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
