"""The folder people download: a standard diffusers pipeline whose transformer is packed."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, get_args

from safetensors.torch import save_file
from torch import Tensor

from dirotq.calibrate.text_codes import Codes, calibrated_codes
from dirotq.device import compute_dtype, pick_device
from dirotq.errors import ArtifactError, ConfigError
from dirotq.files.digest import file_digest
from dirotq.files.json_file import CALL_FILE, INDEX, denoisers, read_json
from dirotq.files.sums import write_sums
from dirotq.kernels.linear import buffer_shapes
from dirotq.models.coverage import share_kept
from dirotq.models.denoisers import alone, prefix
from dirotq.packed.beside import card_of
from dirotq.packed.card import README
from dirotq.packed.made_from import base_of
from dirotq.packed.swap import footprint, put_packed
from dirotq.packed.text_encoders import Choice, Width, choose, write_packed
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.disk import sync
from dirotq.pipeline.sizes import parse_bytes
from dirotq.pipeline.stage import untracked
from dirotq.progress import track
from dirotq.quantize import memory
from dirotq.quantize.plan import SitePlan, read_plan
from dirotq.quantize.tensors import load_site, site_file
from dirotq.sources.folder import carried_files, place_rest
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import PromptSet
from dirotq.sources.weights import (
    plan_shards,
    refuse_damaged,
    refuse_not_finite,
    write_index,
)

LEAST_SHARD = 10_000
"""Bytes of a shard below which a unit was forgotten."""
CODED = ("qweight", "wscale", "wglobal")
"""What `gptq` knows better than `fuse`."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Write ``model/``: the source pipeline, its denoisers packed (layouts L1, L2).

    The weights are written shard by shard: no more than one is in memory.

    ``prompts``  what calibrates 4-bit text encoders (GPTQ), or None: nearest codes
    ``shard``  largest weights file ("2GB": a file is one thread's work when it is checked)
    ``text_encoders``  what becomes of their weights: ``keep``, ``w8`` or ``w4``

    Raises NumericalError naming a tensor, of any component, that holds NaN or infinity.

    Metrics: ``text_linears_nearest`` counts 4-bit linears of text encoders that nothing calibrated.
    """

    version: ClassVar[str] = "6"
    needs = memory.pack

    model: DiffusersModel
    prompts: PromptSet | None
    shard: str | int
    text_encoders: str
    device: str = untracked()

    def __post_init__(self) -> None:
        parse_bytes(self.shard, "pack.shard", LEAST_SHARD)
        if self.text_encoders not in get_args(Width):
            raise ConfigError(
                f"text_encoders={self.text_encoders}: use {', '.join(get_args(Width)[:-1])} or "
                f"{get_args(Width)[-1]} (4-bit weights)"
            )

    def run(
        self, out: Path, *, rank: Artifact, gptq: Artifact, fuse: Artifact
    ) -> Mapping[str, float]:
        plan = read_plan(rank.file("plan.json"))
        folder = out / "model"
        source = self.model.folder()
        encoders = choose(source, self.text_encoders)
        packed = {name: choice for name, choice in encoders.items() if choice.bits}
        refuse_damaged(_weights_beside(source))  # no stage before may have run them
        copies = place_rest(source, folder, written=packed)
        told = self._write_encoders(source, folder, packed) if packed else {}
        for copy in copies:
            if copy.name == "config.json":
                _neutral_dtype(copy)
        transformer = self.model.skeleton()
        parameters = sum(p.numel() for p in transformer.parameters())
        kept_share = share_kept(transformer, (entry.site for entry in plan))
        put_packed(transformer, ((entry.site, entry.spec) for entry in plan))
        tensor = _site_tensors(plan, gptq, fuse)
        with ThreadPoolExecutor(1) as pool:
            settled = [
                pool.submit(_settle, file)
                for component, part in zip(self.model.parts, self.model.prefixes, strict=True)
                for file in self._write(transformer, part, folder / component, plan, tensor)
            ]
            for one in settled:
                one.result()
        call = self.model.call_arguments()
        (folder / CALL_FILE).write_text(json.dumps(call, indent=2, sort_keys=True) + "\n")
        size = sum(footprint(transformer).values())
        card = card_of(
            transformer,
            [(entry.site, entry.spec) for entry in plan],
            name=Path(self.model.path).name,
            base=base_of(self.model),
            pipeline=read_json(folder / INDEX)["_class_name"],
            parameters=parameters,
            call=call,
            encoders={name: choice.bits for name, choice in encoders.items()},
        )
        (folder / README).write_text(card, encoding="utf-8")
        write_sums(folder)  # last: it speaks of every file that is read
        return {
            "transformer_megabytes": size / 1e6,
            "bits_per_parameter": 8 * size / parameters,
            "compression": 16 * parameters / (8 * size),
            "block_parameters_kept": kept_share,
            **told,
            **({"text_encoders_kept": len(encoders) - len(packed)} if encoders else {}),
        }

    def _write(
        self,
        network: Any,
        part: str,
        target: Path,
        plan: Sequence[SitePlan],
        tensor: Callable[[str, str], Tensor],
    ) -> Iterator[Path]:
        """Write the denoiser ``part`` of the network of all; yield each shard when it is there.

        tensor  returns what a site holds, by site and buffer
        """
        # Slow: diffusers.
        from dirotq.quantizer import STORED, DirotqConfig, mark_packed, stored_dtype

        before, denoiser, weights = prefix(part), network.get_submodule(part), self.model.weights()
        entries = [entry for entry in plan if entry.site.name.startswith(before)]
        mark_packed(denoiser, DirotqConfig.of((alone(e.site, part), e.spec) for e in entries))
        target.mkdir(parents=True)
        denoiser.save_config(target)
        sites = {entry.site.name for entry in entries}
        sizes = {
            name: t.numel() * stored_dtype(name, t).itemsize
            for name, t in denoiser.state_dict().items()
        }
        shards = plan_shards(sizes, parse_bytes(self.shard, "pack.shard"))
        for file, names in track(shards.filename_to_tensors.items(), "pack"):
            inside = {before + name: (before + name).rpartition(".") for name in names}
            coded = {n: parts for n, parts in inside.items() if parts[0] in sites}
            kept = weights.tensors(n for n in inside if n not in coded)
            refuse_not_finite(kept)  # `round` reads the packed ones alone
            tensors = {n: t.to(STORED) if t.is_floating_point() else t for n, t in kept.items()}
            tensors |= {n: tensor(site, buffer) for n, (site, _, buffer) in coded.items()}
            save_file(
                {name: tensors[before + name].contiguous() for name in names},
                target / file,
                metadata={"format": "pt"},
            )
            yield target / file
        write_index(target, shards)

    def _write_encoders(
        self, source: Path, folder: Path, packed: Mapping[str, Choice]
    ) -> dict[str, float]:
        """Write text encoders; return their size, and how many 4-bit linears saw no prompts."""
        codes = self._calibrated({n: c for n, c in packed.items() if c.bits == 4})
        size = sum(
            write_packed(source / name, folder / name, choice, self.shard, codes.get(name))
            for name, choice in track(packed.items(), "text encoders")
        )
        told = {"text_encoders_megabytes": size / 1e6}
        if four := sum(len(choice.linears) for choice in packed.values() if choice.bits == 4):
            told["text_linears_nearest"] = four - sum(map(len, codes.values()))
        return told

    def _calibrated(self, encoders: Mapping[str, Choice]) -> dict[str, Codes]:
        """Return codes of linears of these text encoders; none without prompts."""
        if self.prompts is None or not encoders:
            return {}
        device = pick_device(self.device)
        linears = {name: list(choice.linears) for name, choice in encoders.items()}
        prompts = self.prompts.load()
        return calibrated_codes(self.model, prompts, linears, device, compute_dtype(device))


def _weights_beside(source: Path) -> Iterator[Path]:
    """Yield the weights files of all components but the denoisers."""
    index = read_json(source / INDEX)
    for file in track(carried_files(source, index, without=denoisers(index)), "other components"):
        if file.suffix == ".safetensors":
            yield file


def _settle(file: Path) -> None:
    """Bring a file to the disk and hash it, while the next one is written: `write_sums` and the
    store know it then."""
    sync(file)
    file_digest(file)


def _site_tensors(
    plan: Sequence[SitePlan], gptq: Artifact, fuse: Artifact
) -> Callable[[str, str], Tensor]:
    """Return a function of (site, buffer): codes and scales of ``gptq``, all else of ``fuse``."""
    entries = {entry.site.name: entry for entry in plan}

    @lru_cache(1)  # a site's tensors follow each other
    def stored(site: str) -> dict[str, Tensor]:
        file = f"sites/{site_file(site)}"
        quantized, fused = (load_site(source.file(file)) for source in (gptq, fuse))
        return fused | {b: quantized[b] for b in CODED if b in quantized}

    def tensor(site: str, buffer: str) -> Tensor:
        want = buffer_shapes(entries[site].spec, bias=entries[site].site.bias)[buffer]
        found = stored(site)[buffer]
        if tuple(found.shape) != want:
            raise ArtifactError(
                f"{site}.{buffer} has the shape {tuple(found.shape)}, the plan says {want}: the "
                "artifacts of `gptq` and `fuse` are not of this plan; recompute them with "
                "force=[gptq,fuse]"
            )
        return found

    return tensor


def _neutral_dtype(config: Path) -> None:
    """Let a component load in float32 unless told otherwise, as diffusers' own components do.

    transformers takes the dtype noted in a config, so a pipeline loaded without one would mix
    bfloat16 text encoders with a float32 denoiser and fail at its first call.
    """
    values = json.loads(config.read_text())
    noted = {"dtype", "torch_dtype"} & values.keys()
    if noted:
        values |= dict.fromkeys(noted, "float32")
        config.write_text(json.dumps(values, indent=2) + "\n")
