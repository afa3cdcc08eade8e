"""Pipelines of several denoisers, such as Wan 2.2's experts of high and low noise, as one network.

In the line, all that such a network holds has its component's name before its own:
``transformer_2.blocks.0.attn1.qkv``. A packed folder holds each component with its own names. Where
there is one denoiser, nothing has a prefix.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from .family import Site

MAIN = "transformer"
"""The component that every pipeline has; others that denoise are of its class."""


class Denoisers(nn.ModuleDict):
    """All denoisers of a pipeline; what their class says is told by the first."""

    @property
    def config(self) -> Any:
        return self[MAIN].config

    @property
    def _keep_in_fp32_modules(self) -> Any:
        return self[MAIN]._keep_in_fp32_modules


def joined(parts: Mapping[str, nn.Module]) -> Any:
    """Return denoisers by component as one network: the one that there is, or all of them."""
    return parts[MAIN] if len(parts) == 1 else Denoisers(parts)


def denoisers_of(pipe: Any) -> dict[str, Any]:
    """Return the denoisers of a pipeline in memory, by component."""
    kind = type(pipe.transformer)
    return {name: module for name, module in pipe.components.items() if type(module) is kind}


def prefix(part: str) -> str:
    """Return what stands before the names of a component; nothing before those of "" ."""
    return f"{part}." if part else ""


def placed(sites: Iterable[Site], part: str) -> list[Site]:
    """Return sites of one denoiser as sites of all; ``part`` is "" where it is the only one."""
    before = prefix(part)
    return [
        replace(s, name=before + s.name, linears=tuple(before + name for name in s.linears))
        for s in sites
    ]


def alone(site: Site, part: str) -> Site:
    """Return one of :func:`placed` as its component knows it."""
    before = prefix(part)
    names = tuple(name.removeprefix(before) for name in site.linears)
    return replace(site, name=site.name.removeprefix(before), linears=names)
