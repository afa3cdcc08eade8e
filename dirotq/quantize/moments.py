"""Second moments on disk: a block triangle per site, or the rows themselves where those are fewer.

Letters: D channels, T tokens, B side of a tile.
"""

import torch
import zarr
from torch import Tensor

from dirotq.kernels import second_moment
from dirotq.kernels.full_float32 import full_float32
from dirotq.quantize.tensors import create_array, read_array, write_rows


def write_moment(
    group: zarr.Group,
    name: str,
    dim: int,
    tokens: int,
    *,
    total: Tensor | None,
    rows: Tensor | None,
) -> None:
    """Store S = XᵀX / T of one site (docs/method.md Eq. 1), replacing what is there.

    total  float32 block triangle of XᵀX (kernels/second_moment), or None
    rows   X itself, [T, D]; used without ``total``
    """
    stored = total / tokens if total is not None else rows
    assert stored is not None
    create_array(group, name, tuple(stored.shape), stored.dtype)
    write_rows(group, name, 0, stored)
    form = "rows" if total is None else "triangle"
    group[name].attrs.update({"form": form, "tokens": tokens, "dim": dim})


def read_stored(group: zarr.Group, name: str) -> tuple[Tensor, dict]:
    """What :func:`write_moment` stored, on the CPU, with its attributes."""
    return read_array(group, name), dict(group[name].attrs)


def moment(stored: tuple[Tensor, dict], device: torch.device | str) -> Tensor:
    """S, float32 [D, D], symmetric, from what :func:`read_stored` returned."""
    tensor, attributes = stored
    tensor = tensor.to(device)
    if attributes["form"] == "rows":
        x_TD = tensor.float()
        with full_float32():
            return x_TD.mT @ x_TD / len(x_TD)
    return second_moment.unpack(tensor, attributes["dim"])


def read_moment(group: zarr.Group, name: str, device: torch.device | str = "cpu") -> Tensor:
    """S of one site, float32 [D, D]."""
    return moment(read_stored(group, name), device)
