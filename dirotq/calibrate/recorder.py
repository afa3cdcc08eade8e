"""Second moments and sampled rows of the sites under one module, while calls pass through it.

Letters: T tokens of one call, D channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from dirotq.errors import NumericalError
from dirotq.kernels import second_moment
from dirotq.models.call import Call
from dirotq.models.family import Site


@dataclass
class Seen:
    """What one site has seen: its sum XᵀX, or X itself where that is smaller."""

    total: Tensor | None = None
    """float32 block triangle (kernels/second_moment); None as long as ``whole`` holds all rows."""
    whole: list[Tensor] = field(default_factory=list)
    """Every row, of a site that sees fewer rows than half its channels (modulators)."""
    tokens: int = 0
    peak: Tensor | None = None
    """Largest magnitude of each channel, float32 [D]."""
    sample: list[Tensor] = field(default_factory=list)
    """Sampled rows [?, D]."""


class Recorder:
    """Watches ``sites`` of ``transformer`` while the context is open; ``seen`` holds the result.

    calls    the calls that will pass, of which ``current()`` tells the index of the present one
    rows     rows to sample per site over all calls
    seed     changes which rows are sampled
    mask     name of the argument that masks text tokens, or None; masked tokens do not count
    level    divide each call's activations by their root mean square before they are added up, so
             that all calls (timesteps) count alike
    """

    def __init__(
        self,
        transformer: nn.Module,
        sites: Sequence[Site],
        calls: Sequence[Call],
        current: Callable[[], int],
        *,
        rows: int,
        seed: int,
        mask: str | None,
        level: bool,
    ) -> None:
        self.transformer, self.sites, self.calls, self.current = transformer, sites, calls, current
        self.rows, self.seed, self.mask, self.level = rows, seed, mask, level
        self.seen = {site.name: Seen() for site in sites}
        self._hooks: list[Any] = []

    def __enter__(self) -> "Recorder":
        for order, site in enumerate(self.sites):
            linear = self.transformer.get_submodule(site.consumers[0])
            hook = lambda _, args, site=site, order=order: self._on_site(site, order, args[0])  # noqa: E731
            self._hooks.append(linear.register_forward_pre_hook(hook))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _on_site(self, site: Site, order: int, x: Tensor) -> None:
        index = self.current()
        x_TD = self._counted(site, x.detach(), self.calls[index])
        seen = self.seen[site.name]
        take = self._sampled(index, order, len(x_TD))
        if len(take):
            seen.sample.append(x_TD[take.to(x.device)].to(torch.bfloat16))
        if len(x_TD):
            peak_D = x_TD.abs().amax(0).float()
            seen.peak = peak_D if seen.peak is None else torch.maximum(seen.peak, peak_D)
        if self.level:
            x_TD = x_TD / x_TD.float().square().mean().sqrt().clamp_min(1e-30).to(x_TD.dtype)
        if seen.total is None and (seen.tokens + len(x_TD)) > site.dim // 2:
            seen.total = second_moment.new(site.dim, x.device)
            for earlier in seen.whole:
                second_moment.accumulate(seen.total, earlier)
            seen.whole = []
        if seen.total is None:
            seen.whole.append(x_TD.clone())
        else:
            second_moment.accumulate(seen.total, x_TD)
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


def refuse_empty_or_damaged(sites: Sequence[Site], seen: dict[str, Seen]) -> None:
    """Raise NumericalError naming the first site with non-finite activations, or with no token."""
    for site in sites:
        found = seen[site.name]
        if found.tokens == 0:
            empty = sum(one.tokens == 0 for one in seen.values())
            raise NumericalError(
                f"site {site.name} saw no token ({empty} such in its block): the recorded "
                "calls never reach it. Record more calls (capture.calls) or check the model"
            )
        if found.total is not None:
            finite = bool(second_moment.trace(found.total, site.dim).isfinite())
        else:
            finite = all(bool(rows.isfinite().all()) for rows in found.whole)
        if not finite:
            raise NumericalError(
                f"site {site.name}: the 16-bit model's activations are not finite. The model "
                "overflows in this precision or its weights are damaged; nothing was published"
            )
