"""What a packed linear reads: an activation, and what the network does to it just before.

GELU and concatenation cost as much as a read and a write of the activation when they run alone. A
:class:`Prologue` names them instead, and the kernels of ``transform_quantize`` compute them on the
way in; :meth:`Prologue.value` is their definition, and what runs where no kernel does.

Letters: B images, T tokens, D channels, F channels that follow.
"""

from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["plain", "gelu", "concat"]

SHORT = 16
"""Rows of an image below which images that do not lie evenly are copied: a program has 64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prologue:
    """Made by :func:`plain`, :func:`gelu` or :func:`concat_gelu`."""

    kind: Kind
    x_BTD: Tensor
    behind_BTF: Tensor | None = None

    @property
    def rows(self) -> int:
        return self.x_BTD.shape[0] * self.x_BTD.shape[1]

    @property
    def channels(self) -> int:
        behind = 0 if self.behind_BTF is None else self.behind_BTF.shape[-1]
        return self.x_BTD.shape[-1] + behind

    def value(self) -> Tensor:
        """Return [B, T, channels] in x's dtype, as the network computes it without fusion."""
        x = self.x_BTD
        if self.kind == "gelu":
            return functional.gelu(x, approximate="tanh")
        if self.kind == "concat":
            assert self.behind_BTF is not None
            return torch.cat([x, functional.gelu(self.behind_BTF, approximate="tanh")], -1)
        return x

    def laid_out(self) -> "Prologue":
        """Return it as kernels read it: neighbouring channels, and one image of all rows where the
        rows lie evenly, or are brought to: a copy costs less than kernels that read few rows of
        each image."""
        x = _contiguous(self.x_BTD)
        behind = None if self.behind_BTF is None else _contiguous(self.behind_BTF)
        even = _even(x) and (behind is None or _even(behind))
        if not even and x.shape[1] < SHORT:
            x, even = x.contiguous(), True
            behind = None if behind is None else behind.contiguous()
        if even:
            x = x.flatten(0, 1)[None]
            behind = None if behind is None else behind.flatten(0, 1)[None]
        return replace(self, x_BTD=x, behind_BTF=behind)


def kind_of(name: str) -> Kind:
    """Return the kind of that name; raises ValueError if there is none."""
    if name not in get_args(Kind):
        raise ValueError(f"prologue {name!r} is unknown; there are {', '.join(get_args(Kind))}")
    return cast(Kind, name)


def _contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _even(x_BTD: Tensor) -> bool:
    """Tell whether the rows of all images lie the same distance apart."""
    return x_BTD.stride(0) == x_BTD.shape[1] * x_BTD.stride(1)


def plain(x_BTD: Tensor) -> Prologue:
    """Read x itself; a slice of a longer sequence is read where it lies."""
    return Prologue(kind="plain", x_BTD=x_BTD)


def gelu(x_BTF: Tensor) -> Prologue:
    """Apply GELU by its tanh approximation."""
    return Prologue(kind="gelu", x_BTD=x_BTF)


def concat_gelu(x_BTD: Tensor, behind_BTF: Tensor) -> Prologue:
    """Join x's channels and GELU (tanh) of ``behind``."""
    return Prologue(kind="concat", x_BTD=x_BTD, behind_BTF=behind_BTF)
