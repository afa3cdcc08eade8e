"""Random packed linears of real shapes, and whether a kernel computes what it should on them.

Letters: M rows, D channels, K main-branch width, N outputs, R rank.
"""

from typing import Any

import torch
from torch import Tensor

from dirotq.kernels import engine
from dirotq.kernels.formats.hadamard import hadamard_block
from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.linear import QuantLinear

FORMATS: dict[str, dict[str, Any]] = {
    "w4a4": {"act_bits": 4, "act_scale": "rms", "weight_scale": "channel"},
    "w4a8": {"act_bits": 8, "act_scale": "token", "weight_scale": "channel"},
    "w4a4-grouped": {"act_bits": 4, "act_scale": "group", "weight_scale": "group"},
    "w4a16": {"act_bits": 16, "act_scale": "token", "weight_scale": "group"},
}
"""Number formats that have measurements, by ``kernels.plan.kind_of``."""

CHECKED_ROWS = 32
"""First and last rows of a result that are compared with float64."""

SLACK = 3, 5e-3
"""Allowed error: so many times plain torch's, and so much on top. One row of 4-bit codes has only a
few ties that can fall to the other side; the sharp bound, over many rows, is in tests/gpu."""


def spec_for(kind: str, k: int, n: int, rank: int = 64) -> QuantSpec:
    """Return the default method's spec of a linear K -> N in one of :data:`FORMATS`.

    W4A16 is as modulators have it, without transform or low-rank branch.
    """
    plain = kind == "w4a16"
    group = min(64, hadamard_block(k, 64))
    format = {
        "weight_bits": 4,
        "weight_group": group,
        "act_group": 16 if FORMATS[kind]["act_scale"] == "rms" else group,
        **FORMATS[kind],
    }
    transform = {"transform": "hadamard", "block": 1 if plain else hadamard_block(k, 256)}
    shape = {"dim": k, "rows": (n,), "rank": 0 if plain else rank}
    return QuantSpec.from_dict(shape | transform | format)


def random_linear(spec: QuantSpec, *, device: str = "cuda") -> QuantLinear:
    """Draw random codes, scales, low-rank branch, rotation and bias; an orthonormal basis."""
    linear = QuantLinear(spec, bias=True, device=device)
    element = spec.weights.element
    for name, tensor in linear.named_parameters():
        if name == "qweight" and element == "int4":
            shape = spec.outputs, spec.width
            codes_NK = torch.randint(-7, 8, shape, device=device, dtype=torch.int8)
            tensor.copy_(pack_int4(codes_NK))
        elif name == "wscale" and element == "e2m1":  # small, as E4M3 or as E8M0
            tensor.fill_(0x18 if spec.weights.name == "nvfp4" else 121)
        elif not tensor.is_floating_point():
            tensor.random_()
        elif name in ("wscale", "wpscale"):
            tensor.uniform_(0.01, 0.02)
        elif name in ("wglobal", "smooth"):
            tensor.fill_(1)
        elif name == "basis":
            tensor.copy_(torch.linalg.qr(torch.randn(tensor.shape, device=device)).Q)
        elif name == "rotation":
            tensor.normal_(0, spec.in_features**-0.5)
        else:
            tensor.normal_(0, 0.3 if name == "wp" else 1)
    return linear


def random_rows(m: int, d: int, *, device: str = "cuda") -> Tensor:
    """Draw x [M, D] in bf16 with a few loud channels, as trained networks have them."""
    x_MD = torch.randn(m, d, device=device, dtype=torch.bfloat16)
    x_MD[:, :4] *= 20
    return x_MD


def read_bytes(linear: QuantLinear) -> int:
    """Count bytes of a linear at rest, all of which one call reads."""
    return sum(t.numel() * t.element_size() for t in linear.parameters())


class Checker:
    """Whether results for x are right: error against float64 compared with plain torch's in bf16.

    Some rows of x stand for all of them: rows don't depend on one another.
    """

    def __init__(self, linear: QuantLinear, x_MD: Tensor) -> None:
        m = len(x_MD)
        ends = {*range(min(m, CHECKED_ROWS)), *range(max(0, m - CHECKED_ROWS), m)}
        self.rows = torch.tensor(sorted(ends), device=x_MD.device)
        x = x_MD[self.rows]
        packed = linear.packed()
        self.want = engine.reference(x.double(), packed, linear.spec)
        plain = engine.reference(x, packed, linear.spec)
        self.allowed = SLACK[0] * self.error(plain) + SLACK[1]

    def error(self, part: Tensor) -> float:
        return float((part.double() - self.want).norm() / self.want.norm())

    def problem(self, y_MN: Tensor) -> str | None:
        """Say what is wrong with a result; None if nothing is."""
        error = self.error(y_MN[self.rows])
        if error <= self.allowed:  # NaN is not
            return None
        return f"wrong result: relative error {error:.2g}, allowed {self.allowed:.2g}"
