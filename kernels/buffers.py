"""What passes between the parts of a packed linear: its tensors, codes and unpacked weights.

Letters: M rows, N outputs of all linears, K main-branch width, D channels, R rank, G groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .formats.spec import QuantSpec


class Packed(NamedTuple):
    """The tensors of a packed linear, by their names on disk and in ``state_dict``.

    A linear lacks those that are None.
    """

    qweight: Tensor
    """uint8, [N, K // 2], layout L1; L2 in the FP4 formats"""
    wscale: Tensor
    """bf16, [N, G]; in the FP4 formats uint8, E4M3 or E8M0"""
    wglobal: Tensor | None = None
    """float32, [1], the global scale; ``nvfp4`` only"""
    basis: Tensor | None = None
    """bf16, [D, R], the projection down P of the low-rank branch"""
    rotation: Tensor | None = None
    """bf16, [D, K], the dense rotation of the rest; transform ``dense`` only"""
    smooth: Tensor | None = None
    """bf16, [D], a factor per channel of the main branch's input; smoothing only"""
    wp: Tensor | None = None
    """bf16, [N, R], the projection up W P; int8 codes if ``spec.branch.bits`` is 8"""
    wpscale: Tensor | None = None
    """bf16, [N, 1], the scales of those codes"""
    bias: Tensor | None = None
    """bf16, [N]"""

    @property
    def rank(self) -> int:
        return 0 if self.wp is None else self.wp.shape[1]

    def without(self, last: int) -> "Packed":
        """Return the same linear without the last directions of its branch."""
        if last == 0 or self.basis is None or self.wp is None:
            return self
        rank = self.rank - last
        if rank == 0:
            return self._replace(basis=None, wp=None)
        return self._replace(basis=self.basis[:, :rank], wp=self.wp[:, :rank])

    def rows(self, rows: slice) -> "Packed":
        """Return the same linear with some of its outputs."""
        return Packed(
            self.qweight[rows], self.wscale[rows], self.wglobal, self.basis, self.rotation,
            self.smooth,
            *(None if t is None else t[rows] for t in (self.wp, self.wpscale, self.bias)),
        )  # fmt: skip


class Codes(NamedTuple):
    """An activation as a product reads it."""

    codes: Tensor
    """int8 or float8_e4m3fn, [M, K], or more columns (kernels/permuted.py, kernels/appended.py)"""
    scale: Tensor
    """float32, [M, G]"""
    c: Tensor | None
    """[M, R], the low-rank branch's coefficients; None without rank or among the codes' columns"""


class Fp4Codes(NamedTuple):
    """An activation in FP4 as a product reads it: the bytes of layout L2."""

    codes: Tensor
    """uint8, [M, K // 2]"""
    scale: Tensor
    """uint8, [M, G], E4M3 or E8M0"""
    c: Tensor | None
    """[M, R], the low-rank branch's coefficients; None without rank"""
    row: Tensor | None
    """float32, [M], the global scale of each row; ``nvfp4`` only"""


class Unpacked(NamedTuple):
    """Weights in 8 bits, as ``unpack_w4`` leaves them in scratch memory."""

    weights: Tensor
    """int8 or float8_e4m3fn, [N, columns of the codes]"""
    scale: Tensor | None
    """float32, [1, N], where columns are appended"""


class Repacked(NamedTuple):
    """Weights, scales and bias in scratch, in Humming's layouts (kernels/humming_linear)."""

    weights: Tensor
    """int32, [N, K // 8]"""
    scale: Tensor
    """bf16, [1, N]"""
    bias: Tensor | None
    """bf16, [N]"""
    locks: Tensor
    """int32, zero"""


def buffer_shapes(spec: QuantSpec, *, bias: bool) -> dict[str, tuple[int, ...] | None]:
    """Return the shape of every tensor of a packed linear; None for one it doesn't have."""
    n, k, r = spec.outputs, spec.width, spec.rank
    return {
        "qweight": (n, k // 2),
        "wscale": (n, k // spec.weight_group_size),
        "wglobal": (1,) if spec.weights.name == "nvfp4" else None,
        "basis": (spec.in_features, r) if r else None,
        "rotation": (spec.in_features, k) if spec.transform.kind == "dense" else None,
        "smooth": (spec.in_features,) if spec.transform.smooth else None,
        "wp": (n, r) if r else None,
        "wpscale": (n, 1) if r and spec.branch.bits == 8 else None,
        "bias": (n,) if bias else None,
    }


def buffer_dtype(spec: QuantSpec, name: str) -> torch.dtype:
    """Return the dtype of a packed linear's tensor, in memory and on disk."""
    if name == "qweight" or (name == "wscale" and spec.weights.element == "e2m1"):
        return torch.uint8
    if name == "wp" and spec.branch.bits == 8:
        return torch.int8
    return torch.float32 if name == "wglobal" else torch.bfloat16
