"""`make bench-bits`: bits per parameter of real models, everything counted, from shapes alone.

The same Method, QuantSpec and count as in the pipeline, on a model of the meta device.
"""

import torch
from diffusers import FluxTransformer2DModel
from hydra import compose, initialize_config_module
from hydra.utils import instantiate

from dirotq.models.flux import FLUX
from dirotq.models.swap import effective_bits


def main() -> None:
    with initialize_config_module("dirotq.conf", version_base="1.3"):
        method = instantiate(compose("config").method)
    print("| model | r | bits per parameter | GB packed | GB in 16 bits |\n|---|---|---|---|---|")
    for rank in (32, 64, 128):
        with torch.device("meta"):
            transformer = FluxTransformer2DModel(guidance_embeds=True)
        parameters = sum(p.numel() for p in transformer.parameters())
        sites = FLUX.sites(transformer)
        specs = ((site, method.spec(site, rank)) for site in sites)
        bits = effective_bits(transformer, [(s, spec) for s, spec in specs if spec is not None])
        print(
            f"| FLUX.1-dev | {rank} | {bits:.2f} | {bits * parameters / 8e9:.2f} "
            f"| {2 * parameters / 1e9:.2f} |"
        )


if __name__ == "__main__":
    main()
