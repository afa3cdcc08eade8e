"""A shape that is measured, and what we want of it (docs/kernels.md).

Each op lists its own as ``CASES``. Needs neither triton nor a GPU.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A linear of ``m`` rows, ``k`` channels, ``n`` outputs and ``rank`` low-rank directions.

    ``reach`` and ``stretch`` are ratios: how many times faster than 16 bits a linear is, and how
    many times longer than its memory traffic alone an elementwise op takes (there, less is better).
    None where nothing is asked.
    """

    name: str
    m: int
    k: int
    n: int
    rank: int = 64
    reach: float | None = None
    stretch: float | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.k} -> {self.n}, M = {self.m}"
