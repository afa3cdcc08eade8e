"""What a kernel is compiled from, so that tests can compile it for chips that are not here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHIPS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities (major * 10 + minor) that every kernel is compiled for."""

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory a program may use, by compute capability."""

FP8_CHIPS = tuple(chip for chip in CHIPS if chip >= 89)
"""Chips whose tensor cores take FP8-E4M3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """One kernel in one configuration.

    ``signature`` maps every non-constexpr argument to its Triton type ("*bf16", "i32", ...), in the
    kernel's order; ``constants`` every constexpr to its value. Pointers and i32 arguments named in
    ``aligned`` are multiples of 16, as launches on real tensors find them.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    chips: tuple[int, ...] = CHIPS
    tensor_core: bool = True
    """Whether a matrix instruction must appear in the machine code."""
    aligned: tuple[str, ...] = field(default=())
    spills: int = 0
    """Instructions that may spill registers: few of many, where what needs none is slower."""
    registers: int | None = None
    """A thread's at most; None: the compiler's choice."""


def shared_bytes(chip: int) -> int:
    """Shared memory a program may use on ``chip``: an unknown chip has its predecessor's."""
    return 1024 * SHARED_KIB[max((c for c in SHARED_KIB if c <= chip), default=80)]
