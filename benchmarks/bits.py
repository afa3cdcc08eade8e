"""`make bench-bits`: bits per parameter and online FLOPs of real models, from shapes alone.

The same Method, QuantSpec and count as in the pipeline, on a model of the meta device.
"""

from collections.abc import Iterable

import torch
from diffusers import FluxTransformer2DModel
from hydra.utils import instantiate

from dirotq.kernels.formats.spec import QuantSpec
from dirotq.models.flux import FLUX
from dirotq.packed.swap import effective_bits
from dirotq.pipeline.config import compose_config
from dirotq.quantize.plan import Method


def main() -> None:
    ours, dense = (method(name) for name in ("dirotq", "dirotq_dense"))
    print(
        "| model | r | bits per parameter | GB packed | GB in 16 bits "
        "| transform, share of the linears' FLOPs | dense rotation | ours / dense |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for rank in (32, 64, 128, 384):
        with torch.device("meta"):
            transformer = FluxTransformer2DModel(guidance_embeds=True)
        parameters = sum(p.numel() for p in transformer.parameters())
        sites = FLUX.sites(transformer)
        chosen = [(s, spec) for s in sites if (spec := ours.spec(s, rank)) is not None]
        blocks = [spec for site, spec in chosen if site.kind == "block"]
        rotated = [dense.spec(site, rank) for site, _ in chosen if site.kind == "block"]
        linears = sum(2.0 * spec.in_features * spec.outputs for spec in blocks)
        share = online(blocks) / linears
        share_dense = online(spec for spec in rotated if spec is not None) / linears
        bits = effective_bits(transformer, chosen)
        print(
            f"| FLUX.1-dev | {rank} | {bits:.2f} | {bits * parameters / 8e9:.2f} "
            f"| {2 * parameters / 1e9:.2f} | {share:.1%} | {share_dense:.1%} "
            f"| {share / share_dense:.3f} |"
        )


def method(name: str) -> Method:
    """Return a method (conf/method) by its name, behind which overrides may stand."""
    return instantiate(compose_config(f"method={name}".split(), "dirotq.conf").method)


def online(specs: Iterable[QuantSpec]) -> float:
    """Count FLOPs per token that transforming the inputs takes, the products c Vᵀ left out.

    Hadamard blocks count as the matrix products that the kernels make of them, 2 D b; a butterfly
    would take D log b.
    """
    total = 0.0
    for spec in specs:
        coefficients = 2.0 * spec.in_features * spec.rank
        if spec.transform.kind == "dense":
            total += coefficients + 2.0 * spec.in_features * spec.width
        else:
            total += 2 * coefficients + 2.0 * spec.in_features * spec.transform.block
    return total


if __name__ == "__main__":
    main()
