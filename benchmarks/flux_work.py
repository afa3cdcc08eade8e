"""What one forward of FLUX.1 has to compute and to move, counted from shapes.

Letters: T tokens, K channels, N outputs, R protected directions.
"""

from collections import Counter
from dataclasses import dataclass, field

import diffusers

from dirotq.benchmarks.full_size import FLUX as CONFIG
from dirotq.models.family import Site
from dirotq.models.flux import FLUX
from dirotq.models.skeleton import empty_transformer

TEXT = 512
TAIL, STEP = 3, 128
"""Columns of the protected branch per direction; what all are filled up to (docs/kernels.md)."""
RANK = 64


@dataclass(frozen=True, kw_only=True)
class Work:
    """Arithmetic in FLOP and traffic in bytes.

    ``linear_flops``     2 T K N of every linear in a block
    ``packed_flops``     the same with the protected branch and the bias as further columns
    ``attention_flops``  4 T² per head and channel
    ``transform_bytes``  3 per element of a quantized activation: read 2, write 1
    ``unpack_bytes``     1.5 per weight: read a nibble, write a byte
    ``modulator_bytes``  of their 4-bit weights, read once
    ``other_bytes``      queries, keys (rope: read and write) and the residual sums
    ``elements``         T x channels of the residual stream, over all blocks
    ``shapes``           how often a product of (T, K, N) is run
    """

    linear_flops: float = 0
    packed_flops: float = 0
    attention_flops: float = 0
    transform_bytes: float = 0
    unpack_bytes: float = 0
    modulator_bytes: float = 0
    other_bytes: float = 0
    elements: float = 0
    shapes: Counter = field(default_factory=Counter)
    attention: tuple[int, int, int, int] = (1, 24, 0, 128)
    """[B, heads, T, channels] of one attention."""
    attentions: int = 0

    @staticmethod
    def of_linear(m: int, k: int, n: int) -> "Work":
        return Work(
            linear_flops=2.0 * m * k * n,
            packed_flops=2.0 * m * columns(k) * n,
            transform_bytes=3.0 * m * k,
            unpack_bytes=1.5 * k * n,
            shapes=Counter({(m, columns(k), n): 1}),
        )

    @property
    def least_bytes(self) -> float:
        """What has to move beside the products' and attention's own reading."""
        return self.transform_bytes + self.unpack_bytes + self.modulator_bytes + self.other_bytes


def columns(k: int) -> int:
    """Width of the one product that computes main term, protected branch and bias."""
    return -(-(k + TAIL * (RANK + 16)) // STEP) * STEP


def tokens(site: Site, image: int, text: int = TEXT) -> int:
    """Rows that a site of FLUX sees per image."""
    if site.name.startswith("single_"):
        return image + text
    return text if site.text else image


def work(side: int, batch: int = 1, **changes: int) -> Work:
    """Of FLUX.1-dev at ``side`` x ``side`` pixels.

    changes  fields of the transformer's config to replace
    """
    transformer = empty_transformer(CONFIG | changes, diffusers.FluxTransformer2DModel)
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    image = (side // 16) ** 2
    both = batch * (image + TEXT)
    sums: Counter = Counter()
    shapes: Counter = Counter()
    for site in FLUX.sites(transformer):
        n = sum(site.out_features)
        if site.kind == "modulator":
            sums["modulator_bytes"] += 0.53 * site.in_features * n
            continue
        one = Work.of_linear(batch * tokens(site, image), site.in_features, n)
        for key in ("linear_flops", "packed_flops", "transform_bytes", "unpack_bytes"):
            sums[key] += getattr(one, key)
        shapes += one.shapes
    blocks = config.num_layers + config.num_single_layers
    sums["attention_flops"] = blocks * 4.0 * both * (image + TEXT) * width
    # Two gated sums per double block (attention, MLP), one per single block: read 2, 2, write 2.
    residuals = 2 * config.num_layers + config.num_single_layers
    sums["other_bytes"] = both * width * (8.0 * blocks + 6.0 * residuals)
    sums["elements"] = float(blocks * both * width)
    head = (batch, config.num_attention_heads, image + TEXT, config.attention_head_dim)
    return Work(**sums, shapes=shapes, attention=head, attentions=blocks)
