import pytest
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import ones

import dirotq  # noqa: F401
from dirotq.errors import UnsupportedError


@pytest.mark.parametrize("cls", [FluxTransformer2DModel, FluxPipeline])
def test_a_packed_file_alone_says_what_to_call(finished, cls):
    (file,) = (finished["pack"].data / "model" / "transformer").glob("*.safetensors")
    with pytest.raises(
        UnsupportedError, match=r"packed by DiRotQ.*from_pretrained with its folder"
    ):
        cls.from_single_file(str(file))


def test_other_files_are_read_as_ever(tmp_path, folder):
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    save_file({"a.qweight": ones(1), "b.wscale": ones(1)}, tmp_path / "x.safetensors")
    assert len(load_single_file_checkpoint(str(tmp_path / "x.safetensors"))) == 2
