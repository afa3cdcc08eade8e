"""Second moments and sampled rows of every site, streamed while the 16-bit model generates.

Letters: T tokens of one call, D channels.
"""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import zarr
from safetensors.torch import load_file, save_file
from torch import Tensor

from dirotq.device import compute_dtype, pick_device
from dirotq.errors import ConfigError
from dirotq.models.family import Site
from dirotq.models.recorder import Recorder
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
    ``every``   record one denoiser call in this many, and at least one per shard (which ones
                rotates with the shard, so that all timesteps are covered)
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
        call = self.model.call_arguments()
        every = min(self.every, int(call.get("num_inference_steps", self.every)))
        rows = _RowStore(out / "rows.zarr", sites, self.rows, len(shards), fresh=not done)
        for index in track(range(done, len(shards)), "capture"):
            recorder = Recorder(pipe.transformer, sites, every, index, rows.quota)
            with recorder:
                generate(pipe, shards[index], call, output="latent")
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

    def add(self, recorder: Recorder) -> None:
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


def _publish_moments(out: Path, sites: list[Site], totals: _Totals) -> None:
    group = zarr.open_group(out / "moments.zarr", mode="w")
    for site in sites:
        create_array(group, site.name, (site.dim, site.dim), torch.float32)
        write_rows(group, site.name, 0, totals.moments[site.name] / totals.tokens[site.name])
        group[site.name].attrs["tokens"] = totals.tokens[site.name]
    shutil.rmtree(out / "state", ignore_errors=True)
