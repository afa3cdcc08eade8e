"""What a folder becomes in memory."""

import torch
from tiny_pipelines import family_folder

from dirotq.sources.opening import open_pipeline


def test_an_autoencoder_that_takes_no_batch_decodes_one(tiny_root):
    folder = family_folder(tiny_root, "hunyuan_video15")
    pipe = open_pipeline(folder, torch.float32, torch.device("cpu"))
    latents = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both = pipe.vae.decode(latents).sample
        alone = [pipe.vae.decode(one[None]).sample for one in latents]
    assert torch.equal(both, torch.cat(alone))
