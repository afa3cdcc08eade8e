"""Inputs of a linear that every kernel must turn into the same codes, bit by bit."""

import torch
from formats import DEVICE
from torch import Tensor

from dirotq.kernels.formats.hadamard import hadamard_matrix
from dirotq.kernels.formats.spec import QuantSpec


def exact_case(spec: QuantSpec, rows: int) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """x (fp16), P (bf16), and the z and c that they must give, exactly.

    P's columns are those of the Hadamard matrix where z is 0; z is codes times powers of two.
    """
    g = torch.Generator().manual_seed(rows)
    d, qmax = spec.in_features, 2 ** (spec.activations.bits - 1) - 1
    group = spec.activations.group if spec.activations.name != "token" else d
    z = torch.randint(-qmax, qmax + 1, (rows, d // group, group), generator=g).double()
    z[..., 0] = qmax  # every group reaches its largest code
    if spec.activations.name != "token":
        z *= torch.exp2(-torch.randint(0, 5, (rows, d // group, 1), generator=g).double())
        z[:, 0] *= 0
        z[:, 0, 0] = qmax  # and the row has its largest in the first group
    z = z.flatten(1)
    free = torch.tensor([k for k in range(d) if k % group])
    kept = free[torch.randperm(len(free), generator=g)[: spec.rank]].sort().values
    z[:, kept] = 0
    one = hadamard_matrix(spec.transform.block, torch.float64, torch.device("cpu"))
    h = torch.block_diag(*[one] * (d // len(one)))
    c = torch.randint(-4, 5, (rows, spec.rank), generator=g).double()
    x = z @ h + c @ h[kept]
    assert torch.equal(x.half().double(), x)
    p = h[kept].T.bfloat16().contiguous().to(DEVICE) if spec.rank else None
    return x.half().to(DEVICE), p, z.float().to(DEVICE), c.half().to(DEVICE)
