"""A diffusion pipeline on disk: what it is, how to load parts of it, how to call it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dirotq.errors import ConfigError
from dirotq.files.digest import input_digests
from dirotq.files.json_file import CALL_FILE, INDEX, components, read_json
from dirotq.models.discovery import Discovered, discovered
from dirotq.models.families import family_of
from dirotq.models.family import ModelFamily, Site
from dirotq.models.skeleton import empty_transformer
from dirotq.sources.calls import pipeline_class, refuse_call
from dirotq.sources.opening import open_pipeline

from .folder import missing_weights, weight_names
from .lora import parse_loras
from .origin import pipeline_folder, pipeline_identity, single_file
from .single_file import default_base
from .variant import variant_folder, variant_place
from .weights import Weights, read_header, refuse_quantized

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class DiffusersModel:
    """A diffusers pipeline: what to compress.

    ``path``  local diffusers folder, hub id (``org/name[@revision]``), or a .safetensors file with
              a finetuned transformer
    ``call``  overrides of single pipeline arguments (steps, size, ...)
    ``base``  the pipeline (folder or hub id) that a single file's other components come from; None:
              the one that its layout belongs to
    ``lora``  a file, or a list of files and {path, weight}, added to the transformer's weights

    A file and LoRAs are made into a plain diffusers folder once (dirotq/sources/variant.py).
    """

    path: str
    call: Mapping[str, bool | float | list[float] | None]
    base: str | None = None
    lora: str | Sequence[str | Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        parse_loras(self.lora)

    def identity(self) -> dict[str, Any]:
        """Return every byte that can change a result, not its place; of a repository, its commit.

        Raises what :meth:`folder` raises, as far as that shows without weights and classes.
        """
        return {**self._parts(), "call": dict(self.call_arguments())}

    def folder(self, *, weights: bool = True, complete: bool = True) -> Path:
        """Return the checked folder, downloaded and put together where that is needed.

        weights   also the weights; without them only configurations
        complete  hold every component against its class, too, which takes seconds

        Raises ConfigError, UnsupportedError or ArtifactError for what is no 16-bit diffusers
        pipeline around a transformer, or a file or LoRA that does not fit it.
        """
        base, without = self._base()
        root = pipeline_folder(base, weights=weights, without=without, complete=complete)
        if not weights or self._is_plain():
            return root
        return variant_folder(root, self._file(), parse_loras(self.lora), self._parts, self.path)

    def assembled(self) -> Path | None:
        """Return where in the cache a file or LoRAs are, or will be; None if not needed."""
        return None if self._is_plain() else variant_place(self._parts())

    @property
    def family(self) -> ModelFamily:
        """Raises UnsupportedError for a transformer class that no family describes."""
        config = self._config()
        return family_of(config["_class_name"], config)

    @property
    def pipeline_source(self) -> str:
        """Folder or hub id that all components come from which nothing replaces."""
        return self._base()[0]

    def call_arguments(self) -> dict[str, float | int]:
        """Merge call arguments of the family, of the folder's generation.json, and of ``call``."""
        file = self.folder(weights=False, complete=False) / CALL_FILE
        stored = read_json(file) if file.is_file() else {}
        chosen = {**self.family.call, **stored, **self.call}
        return {name: value for name, value in chosen.items() if value is not None}

    def check(self) -> None:
        """Refuse what can be told before a run: the folder, or an argument of its pipeline."""
        folder = self.folder(weights=False)
        if (cls := pipeline_class(read_json(folder / INDEX))) is None:
            return  # pipelines of other libraries are refused where they are opened
        if (file := folder / CALL_FILE).is_file():
            stored = read_json(file)
            refuse_call(cls, {n: v for n, v in stored.items() if n not in self.call}, str(file))
        refuse_call(cls, self.call, "model.call")

    def _config(self) -> dict[str, Any]:
        folder = self.folder(weights=False, complete=False)
        return read_json(folder / "transformer" / "config.json")

    def _file(self) -> Path | None:
        file = single_file(self.path)
        if file is None and self.base:
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
        import diffusers

        cls = getattr(diffusers, self.family.transformer)
        return empty_transformer(cls.load_config(self.folder(weights=False) / "transformer"), cls)

    def sites(self) -> list[Site]:
        """Return every site of the transformer, in order (:class:`ModelFamily`).

        Of a class without a table they are discovered, or UnsupportedError says why they can't be.
        """
        if self.family.rules:
            return self.family.sites(self.skeleton())
        return list(self.discovered().sites)

    def discovered(self) -> Discovered:
        """Return what one traced forward shows, whether there is a table or not."""
        folder, call = self.folder(weights=False), tuple(sorted(self.call_arguments().items()))
        return discovered(folder.resolve(), self.family.transformer, call)

    def weights(self) -> Weights:
        """Return the transformer's tensors on disk, to be read by name."""
        return Weights(self.folder() / "transformer")

    def pipeline(self, dtype: torch.dtype, device: torch.device) -> "DiffusionPipeline":
        """Open the whole 16-bit pipeline, in ``dtype`` on ``device``."""
        return open_pipeline(self.folder(), dtype, device)


def component_bytes(model: DiffusersModel) -> dict[str, int]:
    """Return {component: bytes of its weights}, as far as they are known."""
    root = model.folder(weights=False)
    folders = (root / name for name in sorted(components(read_json(root / INDEX))))
    return {folder.name: _bytes(folder) for folder in folders if folder.is_dir()}


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


def _bytes(folder: Path) -> int:
    files = [folder / name for name in weight_names(folder)]
    found = sum(file.stat().st_size for file in files if file.is_file())
    if not missing_weights(folder):
        return found
    indexes = [read_json(i).get("metadata") for i in folder.glob("*.safetensors.index.json")]
    sizes = [m.get("total_size") for m in indexes if isinstance(m, dict)]
    return max([found, *(size for size in sizes if isinstance(size, int))])
