"""A diffusion pipeline on disk: what it is, how to load parts of it, how to call it."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.files.digest import input_digests
from dirotq.files.json_file import CALL_FILE, INDEX, components, denoisers, read_json
from dirotq.models.autoencoders import WIDE
from dirotq.models.denoisers import joined, placed
from dirotq.models.discovery import Discovered, discovered
from dirotq.models.families import family_of
from dirotq.models.family import ModelFamily, Site
from dirotq.models.pipeline_images import takes_batches
from dirotq.models.skeleton import empty_transformer
from dirotq.sources.calls import (
    pipeline_class,
    refuse_call,
    refuse_mixed,
    refuse_prompts,
    refuse_second,
    refuse_unread,
)
from dirotq.sources.opening import open_pipeline
from dirotq.sources.prompt_files import NEGATIVE
from dirotq.sources.prompts import Prompt, PromptSet

from .folder import missing_weights, weight_names
from .hollow import open_hollow
from .lora import parse_loras
from .origin import pipeline_folder, pipeline_identity, single_file
from .single_file import default_base
from .variant import refuse_misfits, variant_folder, variant_place
from .weights import Weights, read_header, refuse_quantized

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class DiffusersModel:
    """A diffusers pipeline: what to compress.

    ``path``  local diffusers folder, hub id (``org/name[@revision]``), or a .safetensors file with
              a finetuned transformer
    ``call``  overrides of single pipeline arguments (steps, size, ...), as its users call it
    ``sample``  arguments that differ where the line itself generates: to calibrate and to score
    ``base``  the pipeline (folder or hub id) that a single file's other components come from; None:
              the one that its layout belongs to
    ``lora``  a file, or a list of files and {path, weight}, added to the transformer's weights

    A file and LoRAs are made into a plain diffusers folder once (dirotq/sources/variant.py).
    """

    path: str
    call: Mapping[str, bool | float | str | list[float] | None]
    base: str | None = None
    lora: str | Sequence[str | Mapping[str, Any]] | None = None
    sample: Mapping[str, bool | float | str | list[float] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parse_loras(self.lora)

    def identity(self) -> dict[str, Any]:
        """Return every byte that can change a result, not its place; of a repository, its commit.

        Raises what :meth:`folder` raises, as far as that shows without weights and classes.
        """
        folder = self.folder(weights=False, complete=False)  # once: all stages ask, often
        family = _family_in(folder)
        table = {"table": family.revision} if family.revision > 1 else {}
        # Images that a wide autoencoder made are others than those of 16 bits.
        _, vae = components(read_json(folder / INDEX)).get("vae", ("", ""))
        wide = {"vae": "float32"} if vae in WIDE else {}
        call, sampled = self._call(folder, family), self._call(folder, family, self.sample)
        sample = {"sample": sampled} if sampled != call else {}
        return {**self._parts(), "call": call, **sample, **table, **wide}

    def folder(self, *, weights: bool = True, complete: bool = True) -> Path:
        """Return the checked folder, downloaded and put together where that is needed.

        weights   also the weights; without them only configurations
        complete  hold every component against its class, too, which takes seconds

        Raises ConfigError, UnsupportedError or ArtifactError for what is no 16-bit diffusers
        pipeline around a transformer, or a file or LoRA that does not fit it.
        """
        base, without = self._base()
        root = pipeline_folder(base, weights=weights, without=without, complete=complete)
        if self._is_plain():
            return root
        if len(parts := denoisers(read_json(root / INDEX))) > 1:
            raise UnsupportedError(
                f"{base} denoises with {' and '.join(parts)}: it isn't said which of them a single "
                "file or model.lora is for. Merge LoRAs with diffusers (load_lora_weights, "
                "fuse_lora, unload_lora_weights, save_pretrained) and give that folder"
            )
        if not weights:
            return root
        return variant_folder(root, self._file(), parse_loras(self.lora), self._parts, self.path)

    def assembled(self) -> Path | None:
        """Return where in the cache a file or LoRAs are, or will be; None if not needed."""
        return None if self._is_plain() else variant_place(self._parts())

    @property
    def family(self) -> ModelFamily:
        """Raises UnsupportedError for a transformer class that no family describes."""
        return _family_in(self.folder(weights=False, complete=False))

    @property
    def pipeline_source(self) -> str:
        """Folder or hub id that all components come from which nothing replaces."""
        return self._base()[0]

    def call_arguments(self) -> dict[str, Any]:
        """Merge call arguments of the family, of the folder's generation.json, and of ``call``:
        those that the packed model is for.
        """
        folder = self.folder(weights=False, complete=False)
        return self._call(folder, _family_in(folder))

    def sample_arguments(self) -> dict[str, Any]:
        """Merge ``sample`` into these: what the line's own runs are called with."""
        folder = self.folder(weights=False, complete=False)
        return self._call(folder, _family_in(folder), self.sample)

    def as_called(self) -> "DiffusersModel":
        """Return the model whose runs are those of its users: without a ``sample``."""
        return replace(self, sample={}) if self.sample else self

    def check(self) -> None:
        """Refuse what can be told before a run: the folder, a file or LoRA that does not fit it, or
        an argument of its pipeline.
        """
        folder = self.folder(weights=False)
        if (place := self.assembled()) is not None and not place.is_dir():
            refuse_misfits(folder, self._file(), parse_loras(self.lora), self.path)
        if (cls := pipeline_class(read_json(folder / INDEX))) is None:
            return  # pipelines of other libraries are refused where they are opened
        if (file := folder / CALL_FILE).is_file():
            stored = read_json(file)
            refuse_call(cls, {n: v for n, v in stored.items() if n not in self.call}, str(file))
        for where, given, merged in (
            ("model.call", self.call, self.call_arguments()),
            ("model.sample", self.sample, self.sample_arguments()),
        ):
            refuse_call(cls, given, where)
            refuse_second(cls, read_json(folder / INDEX), merged, where)
            if (negative := given.get(NEGATIVE)) is not None:
                refuse_unread(cls, merged, f"{where}.{NEGATIVE}={negative!r:.60} is set", where)

    def check_prompts(self, prompts: PromptSet, most: int) -> None:
        """Refuse prompts without the pictures that the pipeline edits, or with what it won't take.

        most  prompts that make one call (:meth:`batch`)

        Raises ConfigError saying what to give.
        """
        cls = pipeline_class(read_json(self.folder(weights=False) / INDEX))
        if cls is None:
            return
        loaded = prompts.load()
        refuse_prompts(cls, loaded, prompts.path, self.sample_arguments())
        size = self.batch(loaded, most)
        for start in range(0, len(loaded), size):
            refuse_mixed(loaded[start : start + size], prompts.path)

    def batch(self, prompts: Sequence[Prompt], most: int) -> int:
        """Return how many of ``prompts`` make one call of the pipeline; ``most``, or one by one."""
        cls = pipeline_class(read_json(self.folder(weights=False, complete=False) / INDEX))
        alone = any(p.inputs for p in prompts) and not (cls is None or takes_batches(cls))
        return 1 if alone else most

    def _call(
        self, folder: Path, family: ModelFamily, more: Mapping[str, Any] = MappingProxyType({})
    ) -> dict[str, Any]:
        file = folder / CALL_FILE
        stored = read_json(file) if file.is_file() else {}
        chosen = {**family.call, **stored, **self.call, **more}
        return {name: value for name, value in chosen.items() if value is not None}

    def _file(self) -> Path | None:
        file = single_file(self.path)
        if file is None and self.base:
            if Path(self.path).expanduser().is_file():
                raise ConfigError(
                    f"{self.path} is no file of a kind that is read: give one that is named "
                    ".safetensors (rename it if it is one)"
                )
            raise ConfigError(
                f"model.base={self.base} is for a model in a single .safetensors file; "
                f"{self.path} is a whole pipeline. Leave model.base out"
            )
        return file

    def _is_plain(self) -> bool:
        return self._file() is None and not parse_loras(self.lora)

    def _base(self) -> tuple[str, str]:
        """Return the pipeline whose components are used, and the one that is replaced, or ""."""
        if (file := self._file()) is None:
            return self.path, ""
        return self.base or default_base(file, self.path), "transformer"

    def _parts(self) -> dict[str, Any]:
        base, without = self._base()
        parts = pipeline_identity(base, without=without)
        if (file := self._file()) is not None:
            refuse_quantized(read_header(file), self.path)
            parts["transformer"] = input_digests([file])[file]
        if loras := parse_loras(self.lora):
            parts["lora"] = [lora.identity() for lora in loras]
        return parts

    def skeleton(self) -> Any:
        """Build the transformer, its parameters on the meta device, its buffers computed."""
        return self._empty(buffers=True)

    def shapes(self) -> Any:
        """Build the transformer on the meta device, buffers too: for its names and shapes."""
        return self._empty(buffers=False)

    def _empty(self, *, buffers: bool) -> Any:
        import diffusers

        cls, folder = getattr(diffusers, self.family.transformer), self.folder(weights=False)
        return joined(
            {
                part: empty_transformer(cls.load_config(folder / part), cls, buffers=buffers)
                for part in self.parts
            }
        )

    @property
    def parts(self) -> tuple[str, ...]:
        """Components that denoise: ``transformer``, and others where there are experts."""
        return denoisers(read_json(self.folder(weights=False, complete=False) / INDEX))

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What names of each begin with in the network of all (:mod:`dirotq.models.denoisers`)."""
        return self.parts if len(self.parts) > 1 else ("",)

    def sites(self) -> list[Site]:
        """Return every site of the transformer, in order (:class:`ModelFamily`).

        Of a class without a table they are discovered, or UnsupportedError says why they can't be.
        """
        return list(self._sites)

    @cached_property  # building the network takes a fifth of a second at FLUX.1's size
    def _sites(self) -> tuple[Site, ...]:
        network = self.shapes()
        found = [
            placed(self._sites_of(network.get_submodule(part)), part) for part in self.prefixes
        ]
        return tuple(site for sites in found for site in sites)

    def _sites_of(self, transformer: Any) -> list[Site]:
        if self.family.rules:
            return self.family.sites(transformer)
        sites = self.discovered().sites  # traced of the first one
        for site in sites:
            for name, rows in zip(site.linears, site.out_features, strict=True):
                shape = tuple(transformer.get_submodule(name).weight.shape[:2])
                if shape != (rows, site.in_features):
                    raise UnsupportedError(
                        f"{self.path}: {name} is {shape} in one of the transformers "
                        f"{', '.join(self.parts)} and {(rows, site.in_features)} in the first: "
                        "only transformers of one config are discovered together"
                    )
        return list(sites)

    def discovered(self) -> Discovered:
        """Return what one traced forward shows, whether there is a table or not."""
        folder, call = self.folder(weights=False), tuple(sorted(self.call_arguments().items()))
        return discovered(folder.resolve(), self.family.transformer, call)

    def weights(self) -> Weights:
        """Return the transformer's tensors on disk, to be read by name."""
        if len(self.parts) > 1:
            return Weights(self.folder(), self.parts)
        return Weights(self.folder() / "transformer")

    def weights_apart(self) -> dict[str, Weights]:
        """Return the tensors of each denoiser, by component, with its own names."""
        return {part: Weights(self.folder() / part) for part in self.parts}

    def pipeline(
        self,
        dtype: torch.dtype,
        device: torch.device,
        given: Mapping[str, Any] | None = None,
        offloading: str | None = None,
    ) -> "DiffusionPipeline":
        """Open the whole 16-bit pipeline, in ``dtype`` on ``device``.

        Several denoisers are read one after the other, and again and again if there is no room for
        all of them (dirotq/sources/turns.py).

        given       components that take the places of the folder's
        offloading  what waits in host memory, as of :func:`open_pipeline`; several denoisers know
                    by themselves
        """
        if len(self.parts) == 1:
            return open_pipeline(self.folder(), dtype, device, given=given, offloading=offloading)
        from .turns import bring  # slow: accelerate

        pipe = self.hollow(dtype, device, given)
        bring(pipe, self.weights_apart(), dtype, device)
        return pipe

    def hollow(
        self,
        dtype: torch.dtype,
        device: torch.device,
        given: Mapping[str, Any] | None = None,
    ) -> "DiffusionPipeline":
        """Open the 16-bit pipeline on the CPU, its denoisers without weights; it says ``device``.

        given  components that take the places of the folder's
        """
        network = self.skeleton()
        denoisers = {
            part: network.get_submodule(inside)
            for part, inside in zip(self.parts, self.prefixes, strict=True)
        }
        return open_hollow(self.folder(), denoisers, dtype, device, given or {})


def component_bytes(model: DiffusersModel) -> dict[str, int]:
    """Return {component: bytes of its weights}, as far as they are known."""
    root = model.folder(weights=False)
    folders = (root / name for name in sorted(components(read_json(root / INDEX))))
    return {folder.name: _bytes(folder) for folder in folders if folder.is_dir()}


def component_layers(model: DiffusersModel, name: str) -> dict[str, int]:
    """Return {layer: how many numbers its weights hold}; of files that aren't there, as if they
    were one layer, stored in 16 bits.
    """
    part = model.folder(weights=False) / name
    if missing_weights(part):
        return {"": _bytes(part) // 2}
    found: dict[str, int] = defaultdict(int)
    for file in weight_names(part):
        for tensor, (_, shape) in read_header(part / file).items():
            found[tensor.rpartition(".")[0]] += math.prod(shape)
    return found


def cache_bytes(model: DiffusersModel) -> int:
    """Return the bytes that a single file, or LoRAs, are going to take in DiRotQ's cache.

    Components of a Hugging Face cache, which are links, become links to the same files.
    """
    place = model.assembled()
    if place is None or place.is_dir():
        return 0
    root = model.folder(weights=False)
    beside = [f for f in root.glob("*/*.safetensors") if f.parent.name != "transformer"]
    file = Path(model.path).expanduser()
    whole = file.stat().st_size if file.is_file() else _bytes(root / "transformer")
    return whole + sum(f.stat().st_size for f in beside if not f.is_symlink())


def _family_in(folder: Path) -> ModelFamily:
    config = read_json(folder / "transformer" / "config.json")
    return family_of(config["_class_name"], config)


def _bytes(folder: Path) -> int:
    files = [folder / name for name in weight_names(folder)]
    found = sum(file.stat().st_size for file in files if file.is_file())
    if not missing_weights(folder):
        return found
    indexes = [read_json(i).get("metadata") for i in folder.glob("*.safetensors.index.json")]
    sizes = [m.get("total_size") for m in indexes if isinstance(m, dict)]
    return max([found, *(size for size in sizes if isinstance(size, int))])
