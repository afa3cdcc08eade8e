"""How much of a transformer's blocks is in its sites: what is not stays in 16 bits."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from dirotq.errors import ConfigError, UnsupportedError

from .family import Site


def share_kept(transformer: nn.Module, sites: Iterable[Site]) -> float:
    """Return the share of the parameters of repeated blocks that no site in ``sites`` holds.

    transformer  not packed; shapes are enough (meta device)
    """
    whole = sum(p.numel() for p in in_blocks(transformer).values())
    # Sites outside of the repeated blocks are no part of either number.
    held = sum(site.in_features * sum(site.out_features) for site in sites if site.block)
    return max(1 - held / whole, 0.0) if whole else 0.0


def told(transformer: nn.Module, sites: Iterable[Site]) -> str:
    """Say what :func:`share_kept` returns, and how much of it experts are that are no modules."""
    inside = in_blocks(transformer)
    stacked = sum(p.numel() for n, p in inside.items() if _is_stacked(transformer, n, p))
    said = f"{100 * share_kept(transformer, sites):.1f} % of the block parameters stay in 16 bits"
    if not stacked:
        return said
    share = stacked / sum(p.numel() for p in inside.values())
    return f"{said} ({100 * share:.1f} % lie in expert tensors, multiplied slice by slice)"


def refuse_few(
    transformer: nn.Module, sites: Iterable[Site], least: float, stage: str = "rank"
) -> None:
    """Raise UnsupportedError if sites hold less than ``least`` of the blocks' parameters.

    Packing would be slower then, hardly smaller, and look as if it had worked. What a method or an
    override leaves in 16 bits is a decision, and counts as held. ``stage`` is the one that has the
    setting. Raises ConfigError for a ``least`` that is no share.
    """
    if not isinstance(least, int | float) or not 0 <= least <= 1:
        raise ConfigError(f"{stage}.least_packed={least} is no share: use 0 ... 1")
    sites = list(sites)
    left = share_kept(transformer, sites)
    if 1 - left < least:
        largest = sorted(_outside(transformer, sites).items(), key=lambda item: -item[1])[:3]
        name = type(transformer).__name__
        raise UnsupportedError(
            f"{told(transformer, sites)}: of {name} only {1 - left:.1%} can be packed. The largest "
            f"of the rest are {', '.join(name for name, _ in largest)}: DiRotQ packs linears and "
            f"1x1 convolutions that are called as modules. "
            f"{stage}.least_packed={least} asks for more; "
            f"{stage}.least_packed={int(100 * (1 - left)) / 100:g} goes on with it"
        )


def _is_stacked(transformer: nn.Module, name: str, parameter: Any) -> bool:
    """Tell whether a parameter is several matrices, of which a convolution's kernel is none."""
    owner = transformer.get_submodule(name.rpartition(".")[0])
    convolution = isinstance(owner, nn.modules.conv._ConvNd)
    return parameter.ndim == 3 and parameter.shape[0] > 1 and not convolution


def in_blocks(transformer: nn.Module) -> dict[str, Any]:
    """Return {name: parameter} of what lies in repeated blocks."""
    lists = [n for n, m in transformer.named_modules() if isinstance(m, nn.ModuleList)]
    inside = tuple(f"{name}." for name in lists)
    return {n: p for n, p in transformer.named_parameters() if inside and n.startswith(inside)}


def _outside(transformer: nn.Module, sites: Iterable[Site]) -> dict[str, int]:
    held = {f"{linear}.weight" for site in sites for linear in site.linears}
    return {n: p.numel() for n, p in in_blocks(transformer).items() if n not in held}
