"""What float16 can't hold of a bfloat16 tensor, so that saving writes the stored bytes again.

float16 ends at 65504 and at 2^-24. Of trained weights it is one in thousands.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Lost(NamedTuple):
    """The numbers of one tensor that float16 rounds.

    places  int64, [n], in the flattened tensor
    values  bfloat16, [n], as stored
    """

    places: Tensor
    values: Tensor

    @classmethod
    def of(cls, stored: Tensor) -> "Lost":
        """Find them in a bfloat16 tensor."""
        flat = stored.flatten()
        places = (flat.half().bfloat16() != flat).nonzero().flatten()
        return cls(places, flat[places])

    def put_back(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` in bfloat16, with the stored values where it did not change since."""
        flat = tensor.flatten()
        places, values = self.places.to(flat.device), self.values.to(flat.device)
        back = flat.bfloat16()
        same = flat[places].half() == values.half()
        back[places] = torch.where(same, values, back[places])
        return back.view(tensor.shape)
