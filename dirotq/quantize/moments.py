"""What `capture` knows of each site, on disk: its second moment, sampled rows, activation absmax.

A second moment is a block triangle, or the rows themselves where those are fewer.

Letters: D channels, T tokens, B side of a tile.
"""

from typing import Any

import torch
import zarr
from torch import Tensor

from dirotq.calibrate.recorder import Seen
from dirotq.kernels import second_moment
from dirotq.kernels.full_float32 import full_float32
from dirotq.models.family import Site
from dirotq.pipeline.artifact import Artifact
from dirotq.quantize.tensors import read_array, write_array
from dirotq.transfer import upload

TIMESTEPS = "timesteps"
"""Attribute of a site's sampled rows: the timestep of each; captures before 0.2 have none."""


class Captured:
    """What a capture holds of every site. What is read of a site is checked when it is first read:
    of several processes, each checks its own sites."""

    def __init__(self, capture: Artifact) -> None:
        self._capture = capture

    def stored_moment(self, site: Site) -> tuple[Tensor, dict]:
        """Return what :func:`moment` makes S of, on the CPU."""
        return read_stored(self._tree("moments.zarr", site), site.name)

    def moment_on(self, site: Site, device: torch.device) -> tuple[Tensor, dict]:
        """Return the same with the tensor on ``device``."""
        stored, attributes = self.stored_moment(site)
        return upload(stored, device), attributes

    def rows(self, site: Site) -> Tensor:
        """Return sampled activation rows, bfloat16 [T, D], on the CPU."""
        return read_array(self._tree("rows.zarr", site), site.name)

    def timesteps(self, site: Site) -> list[float | None]:
        """Return the timestep that each sampled row is from; empty where none was recorded."""
        told: Any = self._tree("rows.zarr", site)[site.name].attrs.get(TIMESTEPS, [])
        return list(told)

    def absmax(self, site: Site) -> Tensor:
        """Return the largest magnitude of each channel, float32 [D], on the CPU."""
        return read_array(self._tree("peaks.zarr", site), site.name)

    def _tree(self, name: str, site: Site) -> zarr.Group:
        """Return the tree ``name``, in which ``site`` and the root alone are checked."""
        root = self._capture.file(f"{name}/zarr.json").parent
        self._capture.tree(f"{name}/{site.name}")
        return zarr.open_group(root, mode="r")


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
    write_array(group, name, stored)
    form = "rows" if total is None else "triangle"
    group[name].attrs.update({"form": form, "tokens": tokens, "dim": dim})


def read_stored(group: zarr.Group, name: str) -> tuple[Tensor, dict]:
    """Return what :func:`write_moment` stored, on the CPU, with its attributes."""
    return read_array(group, name), dict(group[name].attrs)


def moment(stored: tuple[Tensor, dict], device: torch.device | str) -> Tensor:
    """Return S, float32 [D, D], symmetric, from what :func:`read_stored` returned."""
    tensor, attributes = stored
    tensor = tensor.to(device)
    if attributes["form"] == "rows":
        x_TD = tensor.float()
        with full_float32():
            return x_TD.mT @ x_TD / len(x_TD)
    return second_moment.unpack(tensor, attributes["dim"])


def add_earlier(seen: Seen, dim: int, stored: tuple[Tensor, dict], absmax_D: Tensor) -> None:
    """Add to what one pass has seen of a site what earlier passes left on disk, in place.

    stored  what :func:`read_stored` returned
    """
    earlier, attributes = stored
    tokens, absmax = int(attributes["tokens"]), seen.absmax
    assert absmax is not None
    if seen.total is None and attributes["form"] == "rows":
        seen.whole = [earlier, *(rows.cpu() for rows in seen.whole)]
    else:
        total = seen.triangle(dim, absmax.device)
        earlier = earlier.to(total.device)
        if attributes["form"] == "rows":
            second_moment.accumulate(total, earlier)
        else:
            total += earlier * tokens
    seen.tokens += tokens
    seen.absmax = torch.maximum(absmax.cpu(), absmax_D)
