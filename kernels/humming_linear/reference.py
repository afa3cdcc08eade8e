"""Specification of the layouts that Humming's products read, as the launch brings ours into them.

Letters: N outputs, K main-branch inputs.
"""

import torch
from torch import Tensor

from ..formats.pack_int4 import unpack_int4
from ..permuted import to_permuted

CHUNK = 32
"""Columns whose nibbles lie together: 16 bytes, which the kernel brings in at once."""


def repack(qweight_NK2: Tensor) -> Tensor:
    """Bring layout L1 into Humming's for INT8 codes in R1 order: int32 [N, K // 8].

    Its 16-byte chunks lie as [K // 32, N], whatever the shape says. In a chunk, nibble i (from the
    low end of the first word) is the two's complement code of column i. N and K are multiples of
    64.
    """
    n, k = len(qweight_NK2), 2 * qweight_NK2.shape[1]
    q_NK = to_permuted(unpack_int4(qweight_NK2))
    nibbles = (q_NK & 0xF).view(n, k // CHUNK, CHUNK // 8, 8).to(torch.int64)
    words = (nibbles << torch.arange(0, 32, 4, device=q_NK.device)).sum(-1)  # below 2^32
    return words.transpose(0, 1).reshape(n, k // 8).to(torch.int32)


def permuted_outputs(values_N: Tensor) -> Tensor:
    """Return values per output, [N], in the order in which a thread of the product has them.

    Place 8 i + 2 q + t of every 32 is output 8 q + 2 i + t.
    """
    return values_N.view(-1, 4, 4, 2).transpose(1, 2).flatten()
