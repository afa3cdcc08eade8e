"""What a GPU kernel is for, told by its name, and the time that kernels of a trace take."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

CATEGORIES: tuple[tuple[str, str], ...] = (
    # The first pattern found in the name counts: first the compiler's, which name all that they
    # read; ours stand before those of libraries.
    ("norms, elementwise", r"^triton_"),
    ("attention", r"flash|fmha|sdpa|attention|softmax|^(forward|summarize|round_codes)$"),
    ("unpack", r"^unpack(?!ed)"),
    ("transform, quantize",
     r"^_?(project|rotate|round_rows|scale_rows|gather)|quant|hadamard|e4m3|fp8_rows"),
    ("rope", r"rope|rotary"),
    ("modulators", r"^(one_row|dots)|gemv|w4a16"),
    ("GEMM", r"gemm|nvjet|scaled_mm|cutlass|xmma|cublas|splitk|^(un)?packed_kernel|^tma_kernel"),
    ("norms, elementwise",
     r"norm|elementwise|reduce|welford|cat|copy|fill|gelu|silu|modulat|residual|gate|index|arange"
     r"|triton_|conv|memcpy|memset"),
)  # fmt: skip
OTHER, GAPS = "other", "launch gaps"
NAMES = (*dict.fromkeys(name for name, _ in CATEGORIES[1:]), OTHER, GAPS)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One run of a kernel, in microseconds."""

    name: str
    start: float
    end: float


def category(kernel: str) -> str:
    """Name the category of a kernel."""
    for name, pattern in CATEGORIES:
        if re.search(pattern, kernel, re.IGNORECASE):
            return name
    return OTHER


def busy(kernels: Iterable[Kernel]) -> float:
    """Count microseconds in which at least one kernel ran: those on two streams count once."""
    total, reached = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda k: k.start):
        total += max(kernel.end - max(kernel.start, reached), 0)
        reached = max(reached, kernel.end)
    return total


def by_category(kernels: Iterable[Kernel], wall_ms: float) -> dict[str, float]:
    """Sum milliseconds by category, of one call that takes ``wall_ms`` when it is not traced.

    Categories are sums of durations; launch gaps are the wall time without those moments in which
    some kernel ran. Where two streams overlap the sum is therefore larger than the wall time.
    """
    kernels = list(kernels)
    total: Counter[str] = Counter()
    for kernel in kernels:
        total[category(kernel.name)] += (kernel.end - kernel.start) / 1e3
    found = {name: total[name] for name in NAMES[:-1] if total[name]}
    return found | {GAPS: max(wall_ms - busy(kernels) / 1e3, 0.0)}


def longest(kernels: Iterable[Kernel], count: int = 12) -> list[tuple[str, float, int]]:
    """Return (name, ms, runs) of the kernels that take the most time."""
    time: Counter[str] = Counter()
    runs: Counter[str] = Counter()
    for kernel in kernels:
        time[kernel.name] += (kernel.end - kernel.start) / 1e3  # type: ignore[assignment]
        runs[kernel.name] += 1
    return [(name, ms, runs[name]) for name, ms in time.most_common(count)]
