"""Forward hooks that watch a transformer's sites while it generates.

Letters: T tokens of one call, D channels.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dirotq.errors import NumericalError

from .family import Site


class Recorder:
    """Accumulates second moments, token counts and sampled rows of every site of one shard.

    ``every``  one call in this many is recorded; which ones depends on ``shard``
    ``quota``  rows kept per site

    Afterwards ``moments`` (float64 [D, D], sums over tokens), ``tokens`` and ``rows`` (bfloat16,
    at most ``quota``) hold what was seen, by site; ``probe`` the tensors of the first call.

    Raises NumericalError naming the site whose activations are not finite, or that saw no token.
    """

    def __init__(
        self, transformer: nn.Module, sites: list[Site], every: int, shard: int, quota: int
    ):
        self.transformer, self.sites = transformer, sites
        self.every, self.shard, self.quota = every, shard, quota
        self.calls = -1
        self.moments: dict[str, Tensor] = {}
        self.tokens = dict.fromkeys((site.name for site in sites), 0)
        self.rows: dict[str, Tensor] = {}
        self._keys: dict[str, Tensor] = {}
        self.probe: dict[str, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> "Recorder":
        pre = self.transformer.register_forward_pre_hook(self._on_call, with_kwargs=True)
        self._hooks = [pre]
        for order, site in enumerate(self.sites):
            linear = self.transformer.get_submodule(site.consumers[0])
            hook = lambda _, args, site=site, order=order: self._on_site(site, order, args[0])  # noqa: E731
            self._hooks.append(linear.register_forward_pre_hook(hook))
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for hook in self._hooks:
            hook.remove()
        # Also where the pipeline itself gave up on a non-finite image: this names the site.
        if kind is None or issubclass(kind, NumericalError):
            self._refuse_non_finite()
        empty = [name for name, count in self.tokens.items() if count == 0]
        if empty and kind is None:
            raise NumericalError(
                f"site {empty[0]} saw no token ({len(empty)} such sites): the recorded calls never "
                "reach it. Record more calls (capture.every=1, more prompts) or check the model"
            )

    def _refuse_non_finite(self) -> None:
        """Name the first site, in the order of execution, whose recorded moment is not finite."""
        if not self.moments:
            return
        traces = torch.stack([moment.diagonal().sum() for moment in self.moments.values()])
        for name, finite in zip(self.moments, traces.isfinite().tolist(), strict=True):
            if not finite:
                raise NumericalError(
                    f"site {name}: the 16-bit model's activations are not finite. The model "
                    "overflows in this precision or its weights are damaged; nothing was published"
                )

    @property
    def _active(self) -> bool:
        return (self.calls + self.shard) % self.every == 0

    def _on_call(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._refuse_non_finite()  # per call: one later, every site would be
        self.calls += 1
        if self._active and not self.probe:
            tensors = {k: v for k, v in kwargs.items() if isinstance(v, Tensor)}
            self.probe = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}

    def _on_site(self, site: Site, order: int, x: Tensor) -> None:
        if not self._active:
            return
        x_TD = x.detach().reshape(-1, site.dim).float()
        moment = (x_TD.mT @ x_TD).double()
        total = self.moments.get(site.name)
        self.moments[site.name] = moment if total is None else total.add_(moment)
        self.tokens[site.name] += len(x_TD)
        self._sample(site.name, order, x_TD)

    def _sample(self, name: str, order: int, x_TD: Tensor) -> None:
        """Reservoir of ``quota`` rows, uniform over the shard: every row draws a seeded key, the
        smallest keys stay."""
        seed = (self.shard * 100_003 + order) * 10_007 + self.calls
        keys = torch.rand(len(x_TD), generator=torch.Generator().manual_seed(seed))
        take = keys.argsort()[: self.quota]
        rows = x_TD[take.to(x_TD.device)].to(torch.bfloat16).cpu()
        if name in self.rows:
            keys = torch.cat([self._keys[name], keys[take]])
            rows = torch.cat([self.rows[name], rows])
            take = keys.argsort()[: self.quota]
            rows = rows[take]
        self._keys[name], self.rows[name] = keys[take], rows
