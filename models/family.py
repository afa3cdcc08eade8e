"""Model families as data: which linears read one activation, which are modulators, which stay."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from dirotq.errors import UnsupportedError

Kind = Literal["block", "modulator"]


@dataclass(frozen=True, slots=True)
class Site:
    """One source activation and every linear that reads it (design: one transform, one wide GEMM).

    ``name`` is also the path at which the packed linear lives in the transformer; ``dim`` channels
    come in, ``rows`` outputs per consumer go out.
    """

    name: str
    consumers: tuple[str, ...]
    dim: int
    rows: tuple[int, ...]
    kind: Kind
    bias: bool

    def slices(self) -> Iterator[tuple[str, slice]]:
        """Each consumer with its rows of the site's wide linear."""
        start = 0
        for consumer, rows in zip(self.consumers, self.rows, strict=True):
            yield consumer, slice(start, start + rows)
            start += rows


@dataclass(frozen=True, slots=True)
class SiteRule:
    """Linears under each module matching ``parent`` that read the same tensor.

    ``parent`` is a path with ``*`` for one component; ``consumers`` are paths below it, ``name``
    the site's path below it. A site with one consumer is named after it.
    """

    parent: str
    consumers: tuple[str, ...]
    name: str = ""
    kind: Kind = "block"


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """A table for one transformer class; see models/flux.py for the model to follow."""

    name: str
    transformer: str
    """diffusers class of the transformer."""
    rules: tuple[SiteRule, ...]
    keep: tuple[str, ...]
    """Linears that stay in 16 bits (paths with ``*``)."""
    call: Mapping[str, float | int]
    """Defaults of a pipeline call; a folder's generation.json wins over them."""
    share: Callable[[nn.Module], None] | None = None
    """Makes a transformer whose sites were swapped run each shared one once, in place. Without it
    every consumer computes its own rows: the same numbers, slower."""

    def sites(self, transformer: nn.Module) -> list[Site]:
        """The sites of ``transformer``, in the order of its blocks.

        Raises UnsupportedError if the class is another one, or a linear is claimed by no rule
        (nothing is skipped silently) or by two.
        """
        found_class = type(transformer).__name__
        if found_class != self.transformer:
            raise UnsupportedError(
                f"family {self.name!r} describes {self.transformer}, this model has a {found_class}"
            )
        linears = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
        claimed: dict[str, str] = {}
        sites = []
        for parent in (name for name, _ in transformer.named_modules()):
            for rule in self.rules:
                if not _matches(rule.parent, parent):
                    continue
                consumers = tuple(_join(parent, c) for c in rule.consumers)
                present = tuple(c for c in consumers if c in linears)
                if not present:
                    continue
                name = _join(parent, rule.name) if len(present) > 1 else present[0]
                for consumer in present:
                    _claim(claimed, consumer, f"site {name}")
                sites.append(_site(name, present, [linears[c] for c in present], rule.kind))
        for linear in linears:
            if any(_matches(pattern, linear) for pattern in self.keep):
                _claim(claimed, linear, "keep")
        missing = [linear for linear in linears if linear not in claimed]
        if missing:
            raise UnsupportedError(
                f"family {self.name!r} says nothing about {len(missing)} linear(s) of this "
                f"{found_class}, e.g. {missing[0]}; name them in a site rule or in `keep` "
                f"(models/{self.name}.py)"
            )
        return sites


def _site(name: str, consumers: tuple[str, ...], linears: list[nn.Linear], kind: Kind) -> Site:
    dims = {linear.in_features for linear in linears}
    biases = {linear.bias is not None for linear in linears}
    if len(dims) > 1 or len(biases) > 1:
        raise UnsupportedError(
            f"site {name}: its consumers {list(consumers)} read {sorted(dims)} channels and "
            f"{'differ' if len(biases) > 1 else 'agree'} in having a bias; one site has one input"
        )
    rows = tuple(linear.out_features for linear in linears)
    return Site(name, consumers, dims.pop(), rows, kind, biases.pop())


def _claim(claimed: dict[str, str], linear: str, by: str) -> None:
    if linear in claimed:
        raise UnsupportedError(
            f"linear {linear} is claimed twice: by {claimed[linear]} and by {by}"
        )
    claimed[linear] = by


def _matches(pattern: str, path: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), path) is not None


def _join(parent: str, child: str) -> str:
    return f"{parent}.{child}" if parent else child
