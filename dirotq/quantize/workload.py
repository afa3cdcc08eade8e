"""How much work a model is, from shapes alone: no weights, no forward.

Letters: T tokens of a site in one call for one prompt, D channels, N outputs, R protected.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dirotq.files.json_file import read_json
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.second_moment import TILE, tiles
from dirotq.models.coverage import told
from dirotq.models.family import Site
from dirotq.packed.swap import footprint, put_packed
from dirotq.quantize.plan import Method
from dirotq.quantize.planning import make_plan
from dirotq.sources.model import DiffusersModel, cache_bytes, component_bytes

TEXT = re.compile(r"\.(add_|to_add_|ff_context|context_|txt_)")
"""Linears on text in joint attention, of models that no family table describes."""
SEPARATE = ("WanTransformer3DModel", "QwenImageTransformer2DModel")
"""Transformers that their pipelines call once per branch of guidance, not on a doubled batch."""
TILE_BYTES = 4 * TILE**2


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model, how it is called, and how much of that a run asks for (conf: ``workload``).

    ``ranks``        stage ``rank``: its ``expected(sites)`` tells {site: directions that it will
                     protect}, or an upper estimate
    ``calibration``  prompts to capture; ``heldout`` prompts to validate on
    ``batch``        prompts per pipeline call; ``calls`` denoiser calls to record (per prompt)

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

    @classmethod
    def alone(cls, ranks: Any) -> "Workload":
        """Return the work of one call for one prompt; ``ranks`` has a model and a method."""
        one = {"calibration": 1, "heldout": 1, "batch": 1, "calls": 1}
        return cls(model=ranks.model, method=ranks.method, ranks=ranks, **one)

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
        return self.model.skeleton()

    @cached_property
    def sites(self) -> list[Site]:
        return self.model.sites()

    @property
    def block_sites(self) -> list[Site]:
        return [site for site in self.sites if site.kind == "block"]

    @cached_property
    def call(self) -> dict[str, Any]:
        return dict(self.model.call_arguments())

    @cached_property
    def image_tokens(self) -> int:
        """Of one image or video."""
        height, width, frames = self.size
        frames = (frames - 1) // int(self._autoencoder.get("scale_factor_temporal", 4)) + 1
        return max(round(height * width / self._pixels_per_token**2) * frames, 1)

    @property
    def text_tokens(self) -> int:
        return int(self.call.get("max_sequence_length", 256))

    @property
    def guided(self) -> int:
        """Forwards per step: two where guidance needs the prompt's and an empty one's."""
        embedded = bool(self.transformer.config.get("guidance_embeds"))
        true = "negative_prompt" in self.call and self.call.get("true_cfg_scale", 0) > 1
        scale = "true_cfg_scale" not in self.call and self.call.get("guidance_scale", 0) > 1
        return 2 if not embedded and (true or scale) else 1

    @property
    def recorded(self) -> int:
        """Samples that pass through the network when the recorded calls are replayed."""
        steps = int(self.call.get("num_inference_steps", 20))
        made = self.calibration * steps * self.guided
        doubled = 1 if type(self.transformer).__name__ in SEPARATE else self.guided
        return min(self.calls * doubled, made)

    @property
    def samples(self) -> int:
        """In one call of the denoiser."""
        return self.batch * self.guided

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.transformer.parameters())

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
            return 1
        if _reads_text(site):
            return self.text_tokens
        beside_text = any(_reads_text(s) for s in self.by_block.get(site.block, ()))
        if beside_text or not self._joint:
            return self.image_tokens
        return self.image_tokens + self.text_tokens

    def share(self, site: Site) -> float:
        """Return the part of a forward's FLOPs that a site's linears have."""
        return self._flops(site) / self.forward_flops

    def _flops(self, site: Site) -> float:
        return 2.0 * self.tokens(site) * site.in_features * sum(site.out_features)

    @cached_property
    def forward_flops(self) -> float:
        """One forward for one prompt (one branch of guidance): linears and attention."""
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
        return [told(self.transformer, [site for site, _ in self.planned])]

    @cached_property
    def packed(self) -> dict[str, int]:
        """Bytes of the packed transformer by category (dirotq/packed/swap.py)."""
        skeleton = self.model.skeleton()
        put_packed(skeleton, self.planned)
        return footprint(skeleton)

    @cached_property
    def components(self) -> dict[str, int]:
        """Bytes of the pipeline's other weights (encoders, decoder), as far as they are known."""
        sizes = component_bytes(self.model)
        return {name: size for name, size in sizes.items() if name != "transformer"}

    @property
    def cache_bytes(self) -> int:
        """What the model is going to take in DiRotQ's cache."""
        return cache_bytes(self.model)

    @cached_property
    def _joint(self) -> bool:
        """Text and image are one sequence in attention; without, image attends to text."""
        return any(_reads_text(site) for site in self.sites)

    @cached_property
    def _autoencoder(self) -> dict[str, Any]:
        file = self.model.folder(weights=False) / "vae" / "config.json"
        return read_json(file) if file.is_file() else {}

    @property
    def _pixels_per_token(self) -> float:
        """Along a side: of the autoencoder's scale and of the patches."""
        config, vae = self.transformer.config, self._autoencoder
        names = ("block_out_channels", "encoder_block_out_channels", "dim_mult")
        levels = next((len(vae[n]) for n in names if isinstance(vae.get(n), list)), 4)
        patch = config.get("patch_size") or config.get("all_patch_size") or 1
        patch = max(patch) if isinstance(patch, list | tuple) else patch
        if patch == 1:  # some pipelines make the patches themselves
            channels = config.get("out_channels") or config.get("in_channels") or 1
            patch = max(math.isqrt(channels // vae.get("latent_channels", channels)), 1)
        return float(2 ** (levels - 1) * patch)


def _reads_text(site: Site) -> bool:
    return site.text or bool(TEXT.search(f".{site.linears[0]}"))
