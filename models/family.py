"""Model families as data: which linears read one activation, which are modulators, which stay."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from dirotq.errors import UnsupportedError

Kind = Literal["block", "modulator"]
Fusion = Literal["shared_sites", "norm", "gelu", "concat", "qk_norm_rope", "modulators"]


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
    pointwise: bool = False
    """The consumers are 1x1 convolutions, which read and write [B, C, H, W]."""
    text: bool = False
    """Reads text tokens: those that the model masks are not counted."""

    @property
    def block(self) -> str:
        """The repeated module it lies in ("transformer_blocks.3"), or "" if in none."""
        parts = self.consumers[0].split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        return ".".join(parts[: number + 1])

    def tokens_of(self, x: Tensor) -> Tensor:
        """A consumer's input as rows: [T, D]."""
        x = x.movedim(1, -1) if self.pointwise else x
        return x.reshape(-1, self.dim)

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
    the site's path below it. A site with one consumer is named after it, unless that is a 1x1
    convolution: its own path keeps a module that reads and writes [B, C, H, W].
    """

    parent: str
    consumers: tuple[str, ...]
    name: str = ""
    kind: Kind = "block"
    text: bool = False
    """Reads text tokens (see :class:`Site`)."""


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """A table for one transformer class; see models/flux.py for the model to follow."""

    name: str
    transformer: str
    """diffusers class of the transformer."""
    rules: tuple[SiteRule, ...]
    keep: tuple[str, ...]
    """Linears and 1x1 convolutions that stay in 16 bits (paths with ``*``)."""
    call: Mapping[str, float | int]
    """Defaults of a pipeline call; a folder's generation.json wins over them."""
    mask: str | None = None
    """Argument of the transformer's forward that masks text tokens; None where it masks none."""
    share: Callable[[nn.Module], None] | None = None
    """Makes a transformer whose sites were swapped read each shared one once and run its blocks
    fused, in place. Without it every consumer computes its own rows: the same numbers, slower."""
    fusions: tuple[Fusion, ...] = ()
    """What ``share`` installs: ``shared_sites``, each read once; adaLN's ``norm``, ``gelu`` and
    ``concat`` in the kernels of the linear that reads them; ``qk_norm_rope``, norms of q and k (and
    rotary embeddings, where there are any) in one pass; ``modulators`` of all blocks at once."""

    def sites(self, transformer: nn.Module) -> list[Site]:
        """The sites of ``transformer``, in the order of its blocks.

        Raises UnsupportedError if the class is another one, or a linear or 1x1 convolution is
        claimed by no rule (nothing is skipped silently) or by two.
        """
        found_class = type(transformer).__name__
        if found_class != self.transformer:
            raise UnsupportedError(
                f"family {self.name!r} describes {self.transformer}, this model has a {found_class}"
            )
        linears = {n: m for n, m in transformer.named_modules() if is_linear(m)}
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
                modules = [linears[c] for c in present]
                alone = len(present) == 1 and not is_pointwise(modules[0])
                name = present[0] if alone else _join(parent, rule.name)
                for consumer in present:
                    _claim(claimed, consumer, f"site {name}")
                sites.append(_site(name, present, modules, rule))
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


def is_pointwise(module: nn.Module) -> bool:
    """Whether it is a 1x1 convolution: a linear over the channels of [B, C, H, W]."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
    )


def is_linear(module: nn.Module) -> bool:
    """Whether it multiplies every token by one matrix: a linear or a 1x1 convolution."""
    return isinstance(module, nn.Linear) or is_pointwise(module)


def _site(name: str, consumers: tuple[str, ...], linears: list[Any], rule: SiteRule) -> Site:
    # [N, D], or [N, D, 1, 1] of a convolution.
    rows, dims = zip(*(linear.weight.shape[:2] for linear in linears), strict=True)
    biases = {linear.bias is not None for linear in linears}
    kinds = {is_pointwise(linear) for linear in linears}
    if len(set(dims)) > 1 or len(biases) > 1 or len(kinds) > 1:
        raise UnsupportedError(
            f"site {name}: its consumers {list(consumers)} read {sorted(set(dims))} channels, "
            f"{'differ' if len(biases) > 1 else 'agree'} in having a bias and "
            f"{'differ' if len(kinds) > 1 else 'agree'} in being 1x1 convolutions; one site has "
            "one input"
        )
    if kinds == {True} and not rule.name:
        raise UnsupportedError(
            f"the rule for {consumers[0]} names no site: the path of a 1x1 convolution is taken by "
            "what reads its [B, C, H, W]; give the rule a `name` of its own"
        )
    return Site(
        name,
        consumers,
        dim=dims[0],
        rows=rows,
        kind=rule.kind,
        bias=biases.pop(),
        pointwise=kinds.pop(),
        text=rule.text,
    )


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
