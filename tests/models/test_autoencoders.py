import diffusers
import pytest
import torch
from tiny_pipelines import family_folder

from dirotq.models.autoencoders import NO_HALF, TILED, precision, tile
from dirotq.sources.model import DiffusersModel
from dirotq.sources.opening import open_pipeline

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("AutoencoderKL", {HALF: HALF, BRAIN: BRAIN, FULL: FULL}),
        ("AutoencoderDC", {HALF: FULL, BRAIN: BRAIN, FULL: FULL}),
        ("AutoencoderKLWan", {HALF: FULL, BRAIN: FULL, FULL: FULL}),
        ("", {HALF: HALF, BRAIN: BRAIN, FULL: FULL}),
    ],
)
def test_precision_is_the_pipelines_unless_the_class_needs_more(name, wanted):
    assert {dtype: precision(name, dtype) for dtype in wanted} == wanted


@pytest.mark.parametrize("name", sorted(TILED | NO_HALF))
def test_diffusers_has_the_classes(name):
    assert callable(getattr(diffusers, name).enable_tiling)


def test_a_pipeline_is_opened_with_the_autoencoder_that_it_needs(tiny_root):
    folder = family_folder(tiny_root, "wan")
    pipe = open_pipeline(folder, BRAIN, torch.device("cpu"))
    assert pipe.vae.dtype == FULL and pipe.text_encoder.dtype == BRAIN
    assert DiffusersModel(path=str(folder), call={}).identity()["vae"] == "float32"


def test_an_image_of_several_tiles_is_nearly_the_whole_one():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=1024,
            mid_block_add_attention=False,
        ).eval()  # fmt: skip
    z = torch.randn(1, 4, 288, 288, generator=torch.Generator().manual_seed(0))  # 576 pixels
    with torch.no_grad():
        whole = vae.decode(z).sample
        tile(vae)
        assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (512, 256)
        tiled = vae.decode(z).sample
    assert tiled.shape == whole.shape
    off = (tiled - whole).norm() / whole.norm()
    assert 0 < off < 0.1
