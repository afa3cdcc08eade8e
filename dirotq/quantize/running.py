"""What a packed pipeline takes of a GPU while it runs, from files' headers and shapes alone.

Four phases: its weights are loaded, a text is encoded, latents are denoised, an image is decoded.
Where weights wait in host memory, one component (``model``) or one layer (``group``) comes at a
time. docs/low-vram.md has the figures of published shapes.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt, prod
from pathlib import Path
from typing import Any, Literal

from dirotq.errors import ConfigError
from dirotq.files.json_file import CALL_FILE, INDEX, components, read_json
from dirotq.models.decoding import bytes_of, decoding
from dirotq.quantize import guidance
from dirotq.sources.folder import weight_names
from dirotq.sources.weights import read_header

Offloading = Literal["none", "model", "group"]
"""Nothing waits in host memory, components do, layers do."""
PHASES = ("load", "encode", "denoise", "decode")
SAID: Mapping[Offloading, str] = {
    "none": "everything stays on the GPU",
    "model": "components take turns on the GPU (enable_model_cpu_offload)",
    "group": "layers are brought to the GPU, the next one while one computes "
    "(enable_group_offload)",
}

TILES = (
    "images are decoded in tiles, which shows a little at their seams (pipe.vae.disable_tiling() "
    "makes them whole)"
)
NO_GRAPHS = (
    "no CUDA graphs are recorded, whose memory stays taken while other parts compute "
    "(dirotq.accelerate(pipe, graphs=True) records them)"
)

ALIVE = 4.2
"""Activations alive at a block's peak, as a multiple of the input and output of its widest site."""
CONTEXT = 0.6e9
"""Bytes of a CUDA context and of the libraries' own memory."""
ENCODED = 0.5e9
"""Bytes beside the weights while a text is encoded: all hidden states and the logits of 512 tokens
of a language model of 24 B parameters, T5-XXL takes a fifth; of small encoders, their weights'
size."""
LAYERS = 3
"""Layers on the GPU at once where they are streamed: the one that computes, the next, and one that
is not gone yet."""


@dataclass(frozen=True, slots=True)
class Way:
    """How a pipeline runs: what waits in host memory, whether images are decoded in tiles, whether
    calls of denoisers are recorded as CUDA graphs (of weights that stay where they are)."""

    offloading: Offloading
    tiled: bool = False
    graphs: bool = False

    @property
    def said(self) -> str:
        """What a user is told of it."""
        none = self.offloading == "none"
        notes = [TILES] * self.tiled + [NO_GRAPHS] * (none and not self.graphs)
        return "; ".join((SAID[self.offloading], *notes))


WAYS = tuple(
    Way(kind, tiled, graphs)
    for kind in SAID
    for tiled in (False, True)
    for graphs in ((True, False) if kind == "none" else (False,))
)
"""Fastest first, but images that are whole before tiles: those change them, the lack of graphs does
not. Tiles come before weights in host memory, which cost more time."""
TOLD: Mapping[str, Way] = {
    "none": Way("none", graphs=True),
    "none, tiled": Way("none", tiled=True, graphs=True),
    "model": Way("model"),
    "model, tiled": Way("model", tiled=True),
    "group": Way("group"),
    "group, tiled": Way("group", tiled=True),
}
"""Ways that are reported, by their names there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """Bytes of a pipeline on a GPU, in 16 bits where it is not packed.

    ``weights``  of each component;  ``layers``  of each component's largest layer
    ``denoising``, ``decoding``  activations of one image's call
    ``tiled``  those of decoding in tiles; None where the autoencoder knows none

    A recorded CUDA graph keeps the activations of its call, one graph for each denoiser.
    """

    weights: Mapping[str, int]
    layers: Mapping[str, int]
    denoising: float
    decoding: float
    tiled: float | None = None

    def phases(self, way: Way) -> dict[str, float]:
        """Return the peak of each phase, of the second image and later ones."""
        parts = {phase: self._parts(phase) for phase in PHASES}
        encoding = min(ENCODED, max((self.weights[n] for n in parts["encode"]), default=0))
        decoding = self.tiled if way.tiled and self.tiled is not None else self.decoding
        beside = dict(zip(PHASES, (0.0, encoding, self.denoising, decoding), strict=True))
        if way.graphs:
            idle = self.denoising * len(parts["denoise"])
            beside["encode"] += idle
            beside["denoise"] = max(beside["denoise"], idle)
            beside["decode"] += idle
        if way.offloading == "none":
            held = dict.fromkeys(PHASES, float(sum(self.weights.values())))
        elif way.offloading == "model":
            held = {p: max((self.weights[n] for n in parts[p]), default=0.0) for p in PHASES}
        else:
            held = {p: max(map(self._streamed, parts[p]), default=0.0) for p in PHASES}
        return {phase: CONTEXT + held[phase] + beside[phase] for phase in PHASES}

    def needs(self, way: Way) -> float:
        """Return the peak of a whole image."""
        return max(self.phases(way).values())

    def choose(self, vram: int) -> Way:
        """Return the first of :data:`WAYS` that stays within ``vram`` bytes.

        Raises ConfigError, naming the least that would do, if none does.
        """
        for way in WAYS:
            if self.needs(way) <= vram:
                return way
        way = min(WAYS, key=self.needs)
        least, phases = self.needs(way), self.phases(way)
        raise ConfigError(
            f"vram={vram / 1e9:.3g}GB can't be met: this pipeline takes at least "
            f"{rounded_up(least)} of GPU memory, to {max(PHASES, key=phases.__getitem__)}, where "
            f"{SAID[way.offloading]}. Give vram={rounded_up(least).replace(' ', '')}, make "
            "smaller images (height and width in generation.json), or use device='cpu'"
        )

    def reported(self) -> dict[str, dict[str, float]]:
        """Return the phases of :data:`TOLD`; of tiles where they lower the peak."""
        return {
            name: self.phases(way)
            for name, way in TOLD.items()
            if not way.tiled or self.needs(way) < self.needs(replace(way, tiled=False))
        }

    def told(self) -> list[str]:
        """Return the sentences that `plan` says."""
        said = {"none": "all resident", "model": "with model offload"}
        return [
            f"the packed pipeline on a GPU, {said[kind]}{', decoded in tiles' * bool(tiles)}: "
            + ", ".join(f"~{v / 1e9:.1f} GB to {p}" for p, v in phases.items())
            for name, phases in self.reported().items()
            for kind, _, tiles in [name.partition(", ")]
            if kind in said
        ]

    def _streamed(self, name: str) -> float:
        """Return the bytes of a component's layers that are on the GPU at once."""
        return min(LAYERS * self.layers[name], self.weights[name])

    def _parts(self, phase: str) -> list[str]:
        """Return the components that a phase computes with."""
        if phase == "load":
            return []
        is_denoiser, is_decoder = re.compile("transformer"), re.compile("vae|.*decoder|vocoder")
        denoisers = [n for n in self.weights if is_denoiser.match(n)]
        decoders = [n for n in self.weights if is_decoder.match(n)]
        chosen = {"denoise": denoisers, "decode": decoders}
        others = [n for n in self.weights if n not in denoisers and n not in decoders]
        return chosen.get(phase, others)


def of_folder(folder: Path) -> Running:
    """Return what a packed folder takes, called as its generation.json says.

    Raises what damaged files raise.
    """
    file = folder / CALL_FILE
    call = read_json(file) if file.is_file() else {}
    packing = _config(folder / "transformer").get("quantization_config") or {}
    sites = [entry["site"] for entry in packing.get("sites", ())]
    wide = [s["dim"] + sum(s["rows"]) for s in sites if s["kind"] == "block"]
    return of_calls(folder, max(wide, default=0), call)


def of_calls(
    folder: Path, wide: int, call: Mapping[str, Any], *, batch: int = 1, width: int = 2
) -> Running:
    """Return what a folder takes, packed or not, each call for ``batch`` prompts.

    wide   inputs and outputs of the widest site in a block
    call   arguments of the pipeline
    width  bytes of a number that is not packed

    Raises what damaged files raise.
    """
    weights, layers = {}, {}
    config, vae = (_config(folder / part) for part in ("transformer", "vae"))
    of_vae = max(width, bytes_of(vae))
    for name in components(read_json(folder / INDEX)):
        sizes = _on_gpu(folder / name, of_vae if name == "vae" else width)
        if sizes:
            weights[name], layers[name] = sum(sizes.values()), max(sizes.values())
    alive = activations(config, vae, wide, call)
    scales = {"denoising": width / 2, "decoding": of_vae / bytes_of(vae)}
    scales["tiled"] = scales["decoding"]
    alive = {name: n and batch * scales[name] * n for name, n in alive.items()}
    return Running(weights=weights, layers=layers, **alive)


def activations(
    config: Mapping[str, Any], vae: Mapping[str, Any], wide: int, call: Mapping[str, Any]
) -> dict[str, Any]:
    """Return ``denoising``, ``decoding`` and ``tiled`` of :class:`Running`.

    config, vae  settings of transformer and autoencoder
    wide         inputs and outputs of the widest site in a block
    call         arguments of the pipeline
    """
    height, width = (int(call.get(side, 1024)) for side in ("height", "width"))
    frames = int(call.get("num_frames", 1))
    image = height * width / pixels_per_token(config, vae) ** 2 * latent_frames(vae, frames)
    tokens = image + int(call.get("max_sequence_length", 256))
    transformer, embedded = str(config.get("_class_name")), bool(config.get("guidance_embeds"))
    denoising = ALIVE * 2 * tokens * wide * guidance.samples(call, transformer, embedded)
    return {"denoising": denoising, **decoding(vae, height, width, frames)}


def pixels_per_token(config: Mapping[str, Any], vae: Mapping[str, Any]) -> float:
    """Return the pixels along a token's side: of the autoencoder's scale and of the patches."""
    names = ("block_out_channels", "encoder_block_out_channels", "dim_mult")
    levels = next((len(vae[n]) for n in names if isinstance(vae.get(n), list)), 4)
    patch = config.get("patch_size") or config.get("all_patch_size") or 1
    patch = max(patch) if isinstance(patch, list | tuple) else patch
    if patch == 1:  # some pipelines make the patches themselves
        channels = config.get("out_channels") or config.get("in_channels") or 1
        patch = max(isqrt(channels // vae.get("latent_channels", channels)), 1)
    return float(_factor(vae, "spatial", 2 ** (levels - 1)) * patch)


def latent_frames(vae: Mapping[str, Any], frames: int) -> int:
    """Return how many frames an autoencoder makes of a video's; the first stands alone."""
    return (frames - 1) // _factor(vae, "temporal", 4) + 1


def rounded_up(size: float) -> str:
    """Return a size in tenths of GB, not below it."""
    return f"{-(-size // 1e8) / 10:.1f} GB"


def _on_gpu(part: Path, width: int) -> dict[str, int]:
    """Return the bytes of a component's layers on a GPU, by their paths; ``width`` of a float."""
    found: dict[str, int] = defaultdict(int)
    names = weight_names(part) or {f.name for f in part.glob("*.safetensors")}
    for file in sorted(names):
        for name, (dtype, shape) in read_header(part / file).items():
            path, _, leaf = name.rpartition(".")
            kept = {"I8": 1, "U8": 1, "BOOL": 1, "I64": 8, "I32": 4}.get(dtype, width)
            found[path] += prod(shape) * (4 if leaf == "wglobal" else kept)
    return found


def _factor(vae: Mapping[str, Any], what: str, default: int) -> int:
    """Return by how much an autoencoder shrinks, as its config says it; else the default."""
    names = (f"{what}_compression_ratio", f"scale_factor_{what}")
    return int(next((vae[name] for name in names if vae.get(name)), default))


def _config(part: Path) -> dict[str, Any]:
    file = part / "config.json"
    return read_json(file) if file.is_file() else {}
