"""What a site does to its input before it is rounded: the transform, and the low-rank branch."""

from dataclasses import dataclass
from typing import Literal

from .hadamard import Kind, hadamard_block


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """The change of coordinates of the main branch's input (docs/method.md M1, M2).

    ``kind``    block Hadamard matrices, Sylvester's (``hadamard``) or ``regular`` ones; or
                ``dense``, the paper's rotation
    ``block``   of the Hadamard matrices, 1 is the identity; unused by ``dense``
    ``smooth``  the input is multiplied by one number per channel first

    Raises ValueError for facts that don't go together.
    """

    kind: Literal["hadamard", "regular", "dense"]
    block: int
    smooth: bool

    def __post_init__(self) -> None:
        if self.kind not in ("hadamard", "regular", "dense"):
            raise ValueError(f"transform {self.kind!r} is not 'hadamard', 'regular' or 'dense'")
        if self.kind != "dense" and (self.block < 1 or self.block & (self.block - 1)):
            raise ValueError(
                f"Hadamard block {self.block} is not a power of two; use 1 (no Hadamard) ... 512"
            )
        if self.kind == "dense" and self.smooth:
            raise ValueError("smoothing goes with Hadamard transforms, not with a dense rotation")

    @property
    def matrix(self) -> Kind:
        """Kind of the Hadamard matrix."""
        return "regular" if self.kind == "regular" else "sylvester"

    def largest_block(self, dim: int) -> int:
        """Return the largest block up to ``block`` that divides ``dim`` channels."""
        return hadamard_block(dim, self.block, self.matrix)


NO_TRANSFORM = Transform(kind="hadamard", block=1, smooth=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """The branch that computes the protected directions apart (docs/method.md M2, M3). Its rank is
    each site's own.

    ``kind``  ``project`` takes the directions out of the main branch's input; ``beside`` leaves it
              whole, and what the branch computes is missing from the weights only
    ``bits``  of its coefficients and weights, 16 or 8

    Raises ValueError for anything else.
    """

    kind: Literal["project", "beside"]
    bits: Literal[8, 16]

    def __post_init__(self) -> None:
        if self.kind not in ("project", "beside"):
            raise ValueError(f"branch {self.kind!r} is neither 'project' nor 'beside'")
        if self.bits not in (8, 16):
            raise ValueError(f"protected branches take 8 or 16 bits, not {self.bits}")


PROJECT = LowRank(kind="project", bits=16)
