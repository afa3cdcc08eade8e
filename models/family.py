"""Model families as data: which linears read one activation, which are modulators, which stay."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any, Literal

from torch import Tensor, nn

from dirotq.errors import UnsupportedError

Kind = Literal["block", "modulator"]
OLD_WORDS = {"linears": "consumers", "in_features": "dim", "out_features": "rows"}
"""What fields of a site are called in files."""
TABLE = "table for it: CONTRIBUTING.md says how (about 40 lines)"


@dataclass(frozen=True, slots=True)
class Site:
    """One source activation and every linear that reads it (design: one transform, one wide GEMM).

    ``name``          also the path at which the packed linear lives in the transformer
    ``linears``       paths of the linears that read it, in order
    ``in_features``   channels of the activation; ``out_features`` of each linear

    Files hold the words of the first versions (:meth:`recorded`).
    """

    name: str
    linears: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    kind: Kind
    bias: bool
    pointwise: bool = False
    """The linears are 1x1 convolutions, which read and write [B, C, H, W]."""
    text: bool = False
    """Reads text tokens: those that the model masks are not counted. A ``modulator`` that does is
    no modulator but the keys and values of a cross-attention: few rows, packed alike."""

    def recorded(self) -> dict[str, Any]:
        """Return the site as plan.json and packed folders hold it."""
        fields = {
            OLD_WORDS.get(field.name, field.name): getattr(self, field.name)
            for field in fields_of(self)
        }
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()
        }

    @classmethod
    def from_record(cls, value: Mapping[str, Any]) -> "Site":
        """Read what :meth:`recorded` wrote; raises KeyError or TypeError for other fields."""
        words = {old: new for new, old in OLD_WORDS.items()}
        fields: dict[str, Any] = {
            words.get(key, key): tuple(v) if isinstance(v, list) else v for key, v in value.items()
        }
        return cls(**fields)

    @property
    def block(self) -> str:
        """The repeated module it lies in ("transformer_blocks.3"), or "" if in none."""
        parts = self.linears[0].split(".")
        # The last part is the linear itself: a member of a container, not a block.
        number = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), -1)
        return ".".join(parts[: number + 1])

    def tokens_of(self, x: Tensor) -> Tensor:
        """Return a linear's input as rows: [T, D]."""
        x = x.movedim(1, -1) if self.pointwise else x
        return x.reshape(-1, self.in_features)

    def slices(self) -> Iterator[tuple[str, slice]]:
        """Yield each linear with its rows of the site's wide linear."""
        start = 0
        for linear, features in zip(self.linears, self.out_features, strict=True):
            yield linear, slice(start, start + features)
            start += features


@dataclass(frozen=True, slots=True)
class SiteRule:
    """Linears under each module matching ``parent`` that read the same tensor.

    ``parent`` is a path with ``*`` for one component; ``linears`` are paths below it, ``name`` the
    site's path below it. A site with one linear is named after it, unless that is a 1x1
    convolution: its own path keeps a module that reads and writes [B, C, H, W].
    """

    parent: str
    linears: tuple[str, ...]
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
    call: Mapping[str, float | int | str]
    """Defaults of a pipeline call; a folder's generation.json wins over them."""
    mask: str | None = None
    """Argument of the transformer's forward that masks text tokens; None where it masks none."""
    revision: int = 1
    """Of the rules: a change of the sites that they name must not meet artifacts of others."""

    def sites(self, transformer: nn.Module) -> list[Site]:
        """List the sites of ``transformer``, in the order of its blocks.

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
                paths = (_join(parent, path) for path in rule.linears)
                present = tuple(path for path in paths if path in linears)
                if not present:
                    continue
                modules = [linears[path] for path in present]
                alone = len(present) == 1 and not is_pointwise(modules[0])
                name = present[0] if alone else _join(parent, rule.name)
                for path in present:
                    _claim(claimed, path, f"site {name}")
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
    """Tell whether it is a 1x1 convolution: a linear over the channels of [B, C, H, W]."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
    )


def is_linear(module: nn.Module) -> bool:
    """Tell whether it multiplies every token by one matrix: a linear or a 1x1 convolution."""
    return isinstance(module, nn.Linear) or is_pointwise(module)


def _site(name: str, paths: tuple[str, ...], modules: list[Any], rule: SiteRule) -> Site:
    # [N, D], or [N, D, 1, 1] of a convolution.
    rows, dims = zip(*(module.weight.shape[:2] for module in modules), strict=True)
    biases = {module.bias is not None for module in modules}
    kinds = {is_pointwise(module) for module in modules}
    if len(set(dims)) > 1 or len(biases) > 1 or len(kinds) > 1:
        raise UnsupportedError(
            f"site {name}: its consumers {list(paths)} read {sorted(set(dims))} channels, "
            f"{'differ' if len(biases) > 1 else 'agree'} in having a bias and "
            f"{'differ' if len(kinds) > 1 else 'agree'} in being 1x1 convolutions; one site has "
            "one input"
        )
    if kinds == {True} and not rule.name:
        raise UnsupportedError(
            f"the rule for {paths[0]} names no site: the path of a 1x1 convolution is taken by "
            "what reads its [B, C, H, W]; give the rule a `name` of its own"
        )
    return Site(name, paths, dims[0], rows, rule.kind, biases.pop(), kinds.pop(), rule.text)


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
