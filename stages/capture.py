"""Second moments and sampled rows of every site, streamed while the 16-bit model generates.

Letters: T tokens of one call, D channels.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import zarr
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dirotq.device import compute_dtype, pick_device
from dirotq.errors import ConfigError, NumericalError
from dirotq.models.family import Site
from dirotq.models.source import DiffusersModel, generate
from dirotq.pipeline.stage import untracked
from dirotq.progress import track
from dirotq.prompts import PromptSet
from dirotq.tensors import create_array, write_rows

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Run the calibration prompts and accumulate S = XᵀX / T per site (docs/method.md Eq. 1).

    ``batch``   prompts per pipeline call; one batch is one shard, the unit of resuming
    ``every``   record one denoiser call in this many (which ones rotates with the shard, so that
                all timesteps are covered)
    ``rows``    activation rows kept per site, for proofs and per-layer errors

    Writes ``moments.zarr`` (float32 [D, D] per site, attribute ``tokens``), ``rows.zarr`` (bfloat16
    [rows, D]) and ``probe.safetensors`` (the tensors of one denoiser call).

    Raises NumericalError naming the site whose activations are not finite or that saw no token.
    """

    version: ClassVar[str] = "1"
    resumable: ClassVar[bool] = True

    model: DiffusersModel
    prompts: PromptSet
    batch: int
    every: int
    rows: int
    device: str = untracked()

    def __post_init__(self) -> None:
        if min(self.batch, self.every, self.rows) < 1:
            raise ConfigError(
                f"capture.batch={self.batch}, capture.every={self.every}, "
                f"capture.rows={self.rows}: each must be at least 1"
            )

    def run(self, out: Path) -> Mapping[str, float]:
        device = pick_device(self.device)
        prompts = self.prompts.load()
        shards = [prompts[i : i + self.batch] for i in range(0, len(prompts), self.batch)]
        pipe = self.model.pipeline(compute_dtype(device), device)
        sites = self.model.family.sites(pipe.transformer)
        totals = _resume(out)
        done = totals.shards
        if done:
            log.info("capture resumes after %d of %d shards", done, len(shards))
        else:
            totals.moments = {s.name: torch.zeros(s.dim, s.dim, dtype=torch.float64) for s in sites}
            totals.tokens = dict.fromkeys(totals.moments, 0)
        rows = _RowStore(out / "rows.zarr", sites, self.rows, len(shards), fresh=not done)
        for index in track(range(done, len(shards)), "capture"):
            recorder = _Recorder(pipe.transformer, sites, self.every, index, rows.quota)
            with recorder:
                generate(pipe, shards[index], self.model.call_arguments(), output="latent")
            totals.add(recorder)
            if index == 0:
                save_file(recorder.probe, out / "probe.safetensors")
            rows.write(index, recorder.rows)
            totals.save(out, index + 1)
        _publish_moments(out, sites, totals)
        return {
            "prompts": len(prompts),
            "sites": len(sites),
            "tokens": max(totals.tokens.values()),
        }


class _Totals:
    """Running sums over finished shards; float64, so that resuming changes no bit."""

    def __init__(self) -> None:
        self.shards = 0
        self.moments: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, recorder: "_Recorder") -> None:
        for name, moment in recorder.moments.items():
            self.moments[name] += moment.cpu()
            self.tokens[name] += recorder.tokens[name]

    def save(self, out: Path, shards: int) -> None:
        """Replace the state on disk, whole: a kill leaves either the old or the new one."""
        state = out / "state"
        state.mkdir(exist_ok=True)
        counts = {f"tokens.{name}": torch.tensor(n) for name, n in self.tokens.items()}
        partial = state / "partial"
        save_file({f"moment.{n}": m for n, m in self.moments.items()} | counts, partial)
        partial.replace(state / f"{shards:06d}.safetensors")
        for older in state.glob("*.safetensors"):
            if int(older.stem) < shards:
                older.unlink()


def _resume(out: Path) -> _Totals:
    """The state of the last finished shard, or an empty one."""
    totals = _Totals()
    found = sorted((out / "state").glob("*.safetensors"))
    if found:
        totals.shards = int(found[-1].stem)
        for key, value in load_file(found[-1]).items():
            kind, _, name = key.partition(".")
            if kind == "moment":
                totals.moments[name] = value
            else:
                totals.tokens[name] = int(value)
    return totals


class _RowStore:
    """Sampled rows on disk: each shard owns its own range of rows of every site."""

    def __init__(self, path: Path, sites: list[Site], rows: int, shards: int, *, fresh: bool):
        self.quota = -(-rows // shards)
        self.group = zarr.open_group(path, mode="w" if fresh else "r+")
        if fresh:
            for site in sites:
                create_array(
                    self.group,
                    site.name,
                    (self.quota * shards, site.dim),
                    torch.bfloat16,
                    self.quota,
                )

    def write(self, shard: int, rows: Mapping[str, Tensor]) -> None:
        for name, sample in rows.items():
            # A site that sees few rows (a modulator) repeats them rather than leave zeros.
            repeats = -(-self.quota // max(len(sample), 1))
            write_rows(
                self.group, name, shard * self.quota, sample.repeat(repeats, 1)[: self.quota]
            )


class _Recorder:
    """Forward hooks that accumulate one shard's moments, token counts and sampled rows."""

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

    def __enter__(self) -> "_Recorder":
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


def _publish_moments(out: Path, sites: list[Site], totals: _Totals) -> None:
    group = zarr.open_group(out / "moments.zarr", mode="w")
    for site in sites:
        create_array(group, site.name, (site.dim, site.dim), torch.float32)
        write_rows(group, site.name, 0, totals.moments[site.name] / totals.tokens[site.name])
        group[site.name].attrs["tokens"] = totals.tokens[site.name]
    shutil.rmtree(out / "state", ignore_errors=True)
