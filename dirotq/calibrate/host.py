"""Page-locked host memory, from which a GPU copies at full speed."""

import torch
from torch import Tensor

SLAB = 1 << 30
ALIGNMENT = 256


class HostArena:
    """Page-locked memory cut from large slabs.

    torch rounds each page-locked tensor up to a power of two: 24 GB of weights would take 38.
    Memory comes back when the arena and everything taken from it are gone.
    """

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, size: int) -> Tensor:
        """Return ``size`` bytes, uint8, uninitialized."""
        if self._used + size > len(self._slab):
            slab = max(SLAB, 1 << (size - 1).bit_length())
            self._slab = torch.empty(slab, dtype=torch.uint8, pin_memory=True)
            self._used = 0
        start = self._used
        self._used += -(-size // ALIGNMENT) * ALIGNMENT
        return self._slab[start : start + size]

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a copy of ``tensor`` here."""
        tensor = tensor.contiguous()
        copy = self.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)
