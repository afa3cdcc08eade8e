"""How much work a model is, from shapes alone: no weights, no forward.

Letters: T tokens of a site in one call for one prompt, D channels, N outputs, R protected.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dirotq.files.json_file import read_json
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.second_moment import TILE, tiles
from dirotq.models.coverage import told
from dirotq.models.family import Site
from dirotq.packed.swap import footprint, put_packed
from dirotq.packed.text_encoders import Choice, choose
from dirotq.pipeline.machine import Forwards
from dirotq.quantize import arithmetic, expected, guidance
from dirotq.quantize.plan import Method
from dirotq.quantize.planning import make_plan
from dirotq.quantize.running import latent_frames, pixels_per_token
from dirotq.sources.model import DiffusersModel, cache_bytes, component_bytes, component_layers

TEXT = re.compile(r"\.(add_|to_add_|ff_context|context_|txt_)")
"""Linears on text in joint attention, of models that no family table describes."""
TILE_BYTES = 4 * TILE**2


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, how the line calls it, and how much of that a run asks for (conf: ``workload``).

    ``ranks``        stage ``rank``: its ``expected(sites)`` tells {site: directions that it will
                     protect}, or an upper estimate
    ``calibration``  prompts to capture; ``heldout`` prompts to validate on
    ``batch``        prompts per pipeline call; ``calls`` denoiser calls to record (per prompt)
    ``text_encoders``  keep, w8 or w4

    Derived values are computed when first asked for. Raises what the model's folder and sites
    raise.
    """

    model: DiffusersModel
    method: Method
    ranks: Any
    calibration: int
    heldout: int
    batch: int
    calls: int
    text_encoders: str

    @classmethod
    def alone(cls, ranks: Any) -> "Workload":
        """Return the work of one call for one prompt, as users call it; ``ranks`` has a model and a
        method.
        """
        model = ranks.model.as_called()
        one = {"calibration": 1, "heldout": 1, "batch": 1, "calls": 1}
        return cls(model=model, method=ranks.method, ranks=ranks, text_encoders="keep", **one)

    @cached_property
    def size(self) -> tuple[int, int, int]:
        """Height, width and frames of one image (one frame) or video."""
        height, width = (int(self.call.get(side, 1024)) for side in ("height", "width"))
        return height, width, int(self.call.get("num_frames", 1))

    @property
    def pixels(self) -> int:
        return math.prod(self.size)

    @cached_property
    def transformer(self) -> Any:
        """On the meta device."""
        return self.model.shapes()

    @cached_property
    def sites(self) -> list[Site]:
        return self.model.sites()

    @property
    def block_sites(self) -> list[Site]:
        return [site for site in self.sites if site.kind == "block"]

    @cached_property
    def call(self) -> dict[str, Any]:
        """Arguments of the line's own runs."""
        return dict(self.model.sample_arguments())

    @property
    def as_called(self) -> "Workload":
        """The same, called as the packed model's users call it."""
        return replace(self, model=self.model.as_called()) if self.model.sample else self

    @property
    def steps(self) -> int:
        return int(self.call.get("num_inference_steps", 20))

    @cached_property
    def image_tokens(self) -> int:
        """Of one image or video."""
        height, width, frames = self.size
        side = pixels_per_token(self.transformer.config, self.autoencoder)
        return max(round(height * width / side**2) * latent_frames(self.autoencoder, frames), 1)

    @property
    def text_tokens(self) -> int:
        return int(self.call.get("max_sequence_length", 256))

    @property
    def guided(self) -> int:
        """Forwards per step (dirotq/quantize/guidance.py)."""
        return guidance.branches(self.call, *self._kind)

    @property
    def doubled(self) -> int:
        """Samples of one prompt in one call."""
        return guidance.samples(self.call, *self._kind)

    @property
    def _kind(self) -> tuple[str, bool]:
        """The transformer's class, and whether the scale of guidance is an input of it."""
        embedded = bool(self.transformer.config.get("guidance_embeds"))
        return self.model.family.transformer, embedded

    @property
    def recorded(self) -> int:
        """Samples that pass through the network when the recorded calls are replayed."""
        made = self.calibration * self.steps * self.guided
        return min(self.calls * self.doubled, made)

    @property
    def samples(self) -> int:
        """In one call of the denoiser."""
        return self.batch * self.doubled

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.transformer.parameters())

    @cached_property
    def largest_denoiser(self) -> int:
        """Parameters of the largest of several denoisers, or of the one that there is."""
        parts = self.denoisers.values()
        return max(sum(p.numel() for p in part.parameters()) for part in parts)

    @cached_property
    def by_block(self) -> dict[str, list[Site]]:
        """The repeated modules that hold sites, in order, each with its sites."""
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.block:
                found.setdefault(site.block, []).append(site)
        return found

    @cached_property
    def block_parameters(self) -> int:
        """Of the largest block."""
        blocks = (self.transformer.get_submodule(block) for block in self.by_block)
        return max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)

    @cached_property
    def channels(self) -> int:
        """Width of the residual stream."""
        return min(site.in_features for site in self.block_sites)

    def tokens(self, site: Site) -> int:
        """Rows that a site sees in one call for one prompt (one branch of guidance)."""
        if site.kind == "modulator":
            return self.text_tokens if site.text else 1
        if _reads_text(site):
            return self.text_tokens
        beside_text = any(_reads_text(s) for s in self.by_block.get(site.block, ()))
        if beside_text or not self._joint:
            return self.image_tokens
        return self.image_tokens + self.text_tokens

    def share(self, site: Site) -> float:
        """Return the part of a forward's FLOPs that a site's linears have."""
        return self._flops(site) / self.network_flops

    def _flops(self, site: Site) -> float:
        return 2.0 * self.tokens(site) * site.in_features * sum(site.out_features)

    @property
    def forward_flops(self) -> float:
        """One forward for one prompt (one branch of guidance), of several denoisers on average."""
        return self.network_flops / len(self.model.parts)

    @cached_property
    def network_flops(self) -> float:
        """Linears and attention of all denoisers, in a forward of each."""
        total = sum(map(self._flops, self.sites))
        everything = self.image_tokens + self.text_tokens
        for sites in self.by_block.values():
            inside = [s for s in sites if s.kind == "block"]
            if inside and self._joint:
                total += 4.0 * everything**2 * inside[0].in_features
            elif inside:  # and cross-attention to the text
                total += 4.0 * self.image_tokens * everything * inside[0].in_features
        return total

    @property
    def state(self) -> int:
        """Bytes that a sample on its way between two blocks holds on to, 16 bits a number."""
        tokens = self.image_tokens + self.text_tokens
        return 2 * tokens * self.channels + self.argument_bytes

    @property
    def argument_bytes(self) -> int:
        """Of one sample's call: latents and text encoding."""
        config = self.transformer.config
        names = ("joint_attention_dim", "caption_channels", "text_dim", "cap_feat_dim")
        text = int(next((config[n] for n in names if config.get(n)), self.channels))
        latents = self.image_tokens * int(config.get("in_channels") or 64)
        return 2 * (latents + self.text_tokens * text)

    def moment_bytes(self, site: Site) -> int:
        """Return bytes that ``capture`` keeps of a site: a triangle, or rows if those are fewer."""
        seen = self.tokens(site) * self.recorded
        if seen <= site.in_features // 2:
            return 2 * seen * site.in_features
        return TILE_BYTES * tiles(site.in_features)

    @property
    def widest(self) -> int:
        """Most channels of a block site."""
        return max(site.in_features for site in self.block_sites)

    @property
    def largest_weight(self) -> int:
        """Parameters of the largest site."""
        return max(spec.outputs * spec.in_features for _, spec in self.planned)

    @cached_property
    def planned(self) -> list[tuple[Site, QuantSpec]]:
        """Sites that will be packed, at the ranks that are expected."""
        ranks = self.ranks.expected(self.sites)
        made = make_plan(
            self.method, self.sites, lambda site: (min(ranks[site.name], site.in_features), "")
        )
        return [(line.site, line.spec) for line in made.lines]

    @property
    def notes(self) -> list[str]:
        """Sentences for `plan`."""
        share = told(self.transformer, [site for site, _ in self.planned])
        return [share, *self._guidance, *expected.packed(self.as_called).told()]

    def told(self, forwards: Mapping[str, Forwards]) -> list[str]:
        """Say how much is run of it (dirotq/quantize/arithmetic.py)."""
        return arithmetic.told(self, forwards)

    @property
    def _guidance(self) -> list[str]:
        """Say which branches of guidance calibrate: those that generation runs."""
        negative = self.call.get("negative_prompt")
        if self.guided == 2:
            other = f"the negative prompt {negative!r:.60}" if negative else "an empty one"
            return [f"guidance: each step is calibrated for the prompt and for {other}"]
        if self.call.get("true_cfg_scale", 0) > 1 and negative is None:
            return [
                f"guidance: true_cfg_scale={self.call['true_cfg_scale']:g} does nothing without a "
                "negative prompt, in generation and in calibration. +model.call.negative_prompt="
                "'\" \"', or a column negative_prompt of the prompts, turns it on"
            ]
        return []

    @property
    def encoders(self) -> dict[str, int]:
        """Bytes of the text encoders that will be packed, by name."""
        return {name: choice.size for name, choice in self.encoder_choices.items()}

    @cached_property
    def encoder_choices(self) -> dict[str, Choice]:
        """Text encoders that will be packed, by name."""
        found = choose(self.model.folder(weights=False), self.text_encoders)
        return {name: choice for name, choice in found.items() if choice.bits}

    @cached_property
    def packed(self) -> dict[str, int]:
        """Bytes of the packed transformer by category (dirotq/packed/swap.py)."""
        return footprint(self._packed)

    @cached_property
    def packed_parts(self) -> dict[str, int]:
        """Bytes of each packed denoiser, by component."""
        return {part: sum(footprint(one).values()) for part, one in self.packed_denoisers.items()}

    @property
    def denoisers(self) -> dict[str, Any]:
        """On the meta device, by component."""
        return self._apart(self.transformer)

    @property
    def packed_denoisers(self) -> dict[str, Any]:
        return self._apart(self._packed)

    def _apart(self, network: Any) -> dict[str, Any]:
        parts = zip(self.model.parts, self.model.prefixes, strict=True)
        return {part: network.get_submodule(name) for part, name in parts}

    @cached_property
    def _packed(self) -> Any:
        """The packed denoisers, on the meta device."""
        skeleton = self.model.shapes()
        put_packed(skeleton, self.planned)
        return skeleton

    @cached_property
    def components(self) -> dict[str, int]:
        """Bytes on disk of the other weights (encoders, decoder), as far as they are known."""
        sizes = component_bytes(self.model)
        return {name: size for name, size in sizes.items() if name not in self.model.parts}

    @cached_property
    def component_layers(self) -> dict[str, dict[str, int]]:
        """How many numbers each layer of those holds, in whatever dtype they are stored."""
        return {name: component_layers(self.model, name) for name in self.components}

    @property
    def component_numbers(self) -> dict[str, int]:
        return {name: sum(layers.values()) for name, layers in self.component_layers.items()}

    @property
    def cache_bytes(self) -> int:
        """What the model is going to take in DiRotQ's cache."""
        return cache_bytes(self.model)

    @cached_property
    def _joint(self) -> bool:
        """Text and image are one sequence in attention; without, image attends to text."""
        return any(_reads_text(site) for site in self.sites)

    @cached_property
    def autoencoder(self) -> dict[str, Any]:
        """Settings of the autoencoder; none where there is no such component."""
        file = self.model.folder(weights=False) / "vae" / "config.json"
        return read_json(file) if file.is_file() else {}


def _reads_text(site: Site) -> bool:
    """Tell whether it is of a stream of text in joint attention."""
    return site.kind == "block" and (site.text or bool(TEXT.search(f".{site.linears[0]}")))
