"""A diffusion pipeline on disk: what it is, how to load parts of it, how to call it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dirotq.digest import file_digest
from dirotq.errors import ConfigError, NumericalError
from dirotq.loading import open_pipeline, quiet
from dirotq.prompts import Prompt, resolve

from .families import family_of
from .family import ModelFamily, Site

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CALL_FILE = "generation.json"
IGNORED = ("README.md", "training.json", ".gitattributes")


@dataclass(frozen=True, kw_only=True)
class DiffusersModel:
    """A local diffusers folder. ``call`` overrides single pipeline arguments (steps, size, ...)."""

    path: str
    call: Mapping[str, float | int | None]

    def identity(self) -> dict[str, Any]:
        """Digest of every file that can change a result; the folder's place on disk can't."""
        root = self.folder()
        files = {
            str(p.relative_to(root)): file_digest(p)
            for p in sorted(root.rglob("*"))
            if p.is_file() and p.name not in IGNORED and p.suffix not in (".png", ".jpg")
        }
        return {"files": files, "call": dict(self.call_arguments())}

    def folder(self) -> Path:
        """The checked folder.

        Raises ConfigError if it is no diffusers pipeline, or holds weights only as pickles.
        """
        root = resolve(self.path)
        if not (root / "model_index.json").is_file():
            found = sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else "nothing"
            raise ConfigError(
                f"{self.path} is no diffusers pipeline: it has no model_index.json (found "
                f"{found}). Give the folder that pipeline.save_pretrained(...) wrote."
            )
        for part in sorted(p for p in root.iterdir() if p.is_dir()):
            pickles = sorted(p.name for p in part.iterdir() if p.suffix in PICKLES)
            if pickles and not list(part.glob("*.safetensors")):
                raise ConfigError(
                    f"{part} holds its weights as a pickle ({pickles[0]}), which can run code when "
                    "loaded and is refused. Convert it where you trust it: "
                    "DiffusionPipeline.from_pretrained(folder).save_pretrained(new_folder, "
                    "safe_serialization=True)"
                )
        config = root / "transformer" / "config.json"
        if not config.is_file():
            raise ConfigError(
                f"{self.path} has no transformer/config.json: DiRotQ compresses pipelines whose "
                "denoiser is a diffusion transformer"
            )
        if "quantization_config" in json.loads(config.read_text()):
            raise ConfigError(
                f"{self.path} is already quantized (its transformer carries a "
                "quantization_config); compress the 16-bit model it was made from"
            )
        return root

    @property
    def family(self) -> ModelFamily:
        """Raises UnsupportedError for a transformer class that no family describes."""
        config = json.loads((self.folder() / "transformer" / "config.json").read_text())
        return family_of(config["_class_name"])

    def call_arguments(self) -> dict[str, float | int]:
        """Pipeline call arguments: of the family, of the folder's generation.json, of ``call``."""
        file = self.folder() / CALL_FILE
        stored = json.loads(file.read_text()) if file.is_file() else {}
        chosen = {**self.family.call, **stored, **self.call}
        return {name: value for name, value in chosen.items() if value is not None}

    def skeleton(self) -> nn.Module:
        """The transformer on the meta device: shapes without weights."""
        cls = _transformer_class(self.family)
        config = cls.load_config(self.folder() / "transformer")
        with torch.device("meta"):
            return cls.from_config(config)

    def sites(self) -> list[Site]:
        """Every site of the transformer, in order; see :class:`ModelFamily`."""
        return self.family.sites(self.skeleton())

    def transformer(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
        """The 16-bit transformer, in ``dtype``."""
        with quiet():
            transformer = _transformer_class(self.family).from_pretrained(
                self.folder(), subfolder="transformer", dtype=dtype, use_safetensors=True
            )
        return transformer.to(device)

    def pipeline(self, dtype: torch.dtype, device: torch.device) -> "DiffusionPipeline":
        """The whole 16-bit pipeline, in ``dtype`` on ``device``."""
        return open_pipeline(self.folder(), dtype, device)


def generate(
    pipe: Any, prompts: Sequence[Prompt], call: Mapping[str, float | int], *, output: str = "pt"
) -> Tensor:
    """One pipeline call for a batch of prompts, each from the noise of its own seed.

    returns  float32 on the CPU: images [B, 3, H, W] in [0, 1] (``output="pt"``) or latents

    Raises NumericalError if an image is not finite.
    """
    result = (
        pipe(
            prompt=[p.text for p in prompts],
            # On the CPU, so that a seed means the same noise on every machine.
            generator=[torch.Generator("cpu").manual_seed(p.seed) for p in prompts],
            output_type=output,
            **call,
        )
        .images.float()
        .cpu()
    )
    if not result.isfinite().all():
        raise NumericalError(
            f"the pipeline produced a non-finite image for one of {[p.text for p in prompts]}; "
            "the model itself overflows in this precision, or its weights are damaged"
        )
    return result


def stacked_weight(transformer: nn.Module, site: Site) -> tuple[Tensor, Tensor | None]:
    """All consumers of a site as one linear: float32 weight [N, D] and bias [N] or None.

    Raises NumericalError naming the linear whose weights are not finite.
    """
    linears: list[Any] = [transformer.get_submodule(name) for name in site.consumers]
    for name, linear in zip(site.consumers, linears, strict=True):
        if not all(bool(p.isfinite().all()) for p in linear.parameters()):
            raise NumericalError(
                f"{name}: the weights hold NaN or infinity; the checkpoint is damaged, nothing "
                "downstream can be right"
            )
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    bias = torch.cat([linear.bias.detach().float() for linear in linears]) if site.bias else None
    return weight, bias


def _transformer_class(family: ModelFamily) -> Any:
    import diffusers

    return getattr(diffusers, family.transformer)
