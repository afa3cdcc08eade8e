"""Second moments and sampled rows of the sites under one module, while calls pass through it.

Letters: T tokens of one call, D channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dirotq.errors import NumericalError
from dirotq.kernels import second_moment
from dirotq.models.call import Call
from dirotq.models.family import Site

from .replay import Replay


@dataclass
class Seen:
    """What one site has seen: its sum XᵀX, or X itself where that is smaller."""

    total: Tensor | None = None
    """float32 block triangle (kernels/second_moment); None as long as ``whole`` holds all rows."""
    whole: list[Tensor] = field(default_factory=list)
    """Every row, of a site that sees fewer rows than half its channels (modulators)."""
    tokens: int = 0
    absmax: Tensor | None = None
    """Largest magnitude of each channel, float32 [D]."""
    sample: list[Tensor] = field(default_factory=list)
    """Sampled rows [?, D]."""
    sampled: list[int] = field(default_factory=list)
    """Per sampled row the call that it is from."""

    def triangle(self, dim: int, device: torch.device) -> Tensor:
        """Return the sum as a triangle, on ``device`` if it was none yet."""
        if self.total is None:
            self.total = second_moment.new(dim, device)
            for rows in self.whole:
                second_moment.accumulate(self.total, rows)
            self.whole = []
        return self.total


@dataclass(frozen=True, kw_only=True)
class Recorder:
    """Watches sites of a replay's transformer while ``calls`` make one pass through it.

    rows     rows to sample per site over all calls
    seed     changes which rows are sampled
    mask     name of the argument that masks text tokens, or None; masked tokens do not count
    """

    replay: Replay
    calls: Sequence[Call]
    rows: int
    seed: int
    mask: str | None
    complete: bool = True

    @contextmanager
    def watching(self, sites: Sequence[Site]) -> Iterator[dict[Site, Seen]]:
        """Yield {site: what it has seen}, complete when the context closes.

        Raises NumericalError then, naming the first site that saw no token, or whose activations
        are not finite.
        """
        seen = {site: Seen() for site in sites}
        with ExitStack() as hooks:
            for order, site in enumerate(sites):
                linear = self.replay.transformer.get_submodule(site.linears[0])
                hook = partial(self._on_site, site, order, seen[site])
                hooks.callback(linear.register_forward_pre_hook(hook).remove)
            yield seen
        if self.complete:
            _refuse_empty(seen)
        _refuse_damaged(seen)

    def _on_site(self, site: Site, order: int, seen: Seen, _: nn.Module, args: Any) -> None:
        index = self.replay.current
        x_TD = self._counted(site, args[0].detach(), self.calls[index])
        take = self._sampled(index, order, len(x_TD))
        for row in take.tolist():  # an index on the device would wait for all that is queued
            seen.sample.append(x_TD[row : row + 1].to(torch.bfloat16, copy=True))
        seen.sampled += [index] * len(take)
        if len(x_TD):
            absmax_D = x_TD.abs().amax(0).float()
            earlier = seen.absmax
            seen.absmax = absmax_D if earlier is None else torch.maximum(earlier, absmax_D)
        if seen.total is None and seen.tokens + len(x_TD) <= site.in_features // 2:
            seen.whole.append(x_TD.clone())
        else:
            second_moment.accumulate(seen.triangle(site.in_features, x_TD.device), x_TD)
        seen.tokens += len(x_TD)

    def _counted(self, site: Site, x: Tensor, call: Call) -> Tensor:
        if site.text and self.mask is not None:
            mask = call.kwargs.get(self.mask)
            if isinstance(mask, Tensor) and mask.shape == x.shape[:-1]:
                return x[mask.to(x.device).bool()]
        return site.tokens_of(x)

    def _sampled(self, index: int, order: int, tokens: int) -> Tensor:
        """Which rows of this call to keep: an even share of ``rows``, at random places."""
        count = len(self.calls)
        share = (index + 1) * self.rows // count - index * self.rows // count
        generator = torch.Generator().manual_seed((self.seed * 10_007 + index) * 100_003 + order)
        return torch.randint(tokens, (share,), generator=generator) if tokens else torch.empty(0)


def _refuse_empty(seen: Mapping[Site, Seen]) -> None:
    empty = [site.name for site, found in seen.items() if found.tokens == 0]
    if empty:
        raise NumericalError(
            f"site {empty[0]} saw no token ({len(empty)} such in its block): the recorded calls "
            "never reach it. Record more calls (capture.calls) or check the model"
        )


def _refuse_damaged(seen: Mapping[Site, Seen]) -> None:
    for site, found in seen.items():
        if found.total is not None:
            finite = bool(second_moment.trace(found.total, site.in_features).isfinite())
        else:
            finite = all(bool(rows.isfinite().all()) for rows in found.whole)
        if not finite:
            raise NumericalError(
                f"site {site.name}: the 16-bit model's activations are not finite. The model "
                "overflows in this precision or its weights are damaged; nothing was published"
            )
