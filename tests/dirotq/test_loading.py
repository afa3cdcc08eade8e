import json
import math
import shutil

import diffusers
import pytest
import torch
import transformers
from tiny_line import CALL, CAPTIONS

import dirotq
from dirotq.errors import ArtifactError
from dirotq.files.sums import SUMS, write_sums
from dirotq.kernels.linear import QuantLinear
from dirotq.sources.opening import SHARE, component_bytes, open_pipeline


def image(pipe) -> torch.Tensor:
    noise = torch.Generator("cpu").manual_seed(1)
    return pipe(CAPTIONS[0], generator=noise, output_type="pt", **CALL).images.float()


def test_artifact_and_model_folder_are_the_same_pipeline(finished):
    by_artifact = dirotq.load(finished["pack"].path)
    by_folder = dirotq.load(str(finished["pack"].data / "model"), device="cpu")
    assert torch.equal(image(by_artifact), image(by_folder))
    assert any(isinstance(m, QuantLinear) for m in by_folder.transformer.modules())


def test_the_folder_may_be_moved(finished, tmp_path):
    moved = shutil.copytree(finished["pack"].data / "model", tmp_path / "anywhere else")
    assert torch.equal(image(dirotq.load(moved)), image(dirotq.load(finished["pack"].path)))


def test_dtype_is_that_of_the_sixteen_bit_parts(finished):
    default = dirotq.load(finished["pack"].path, device="cpu")
    assert default.transformer.x_embedder.weight.dtype == torch.float32
    half = dirotq.load(finished["pack"].path, device="cpu", dtype=torch.bfloat16)
    assert half.transformer.x_embedder.weight.dtype == torch.bfloat16
    assert half.vae.decoder.conv_in.weight.dtype == torch.bfloat16
    close = (image(half) - image(default)).abs().max()
    assert 0 < close < 0.1


def test_a_pipeline_that_is_not_packed(folder, tmp_path, caplog):
    with pytest.raises(ArtifactError, match=r"not packed by DiRotQ.*dirotq compress model="):
        dirotq.load(folder)
    with pytest.raises(ArtifactError, match=r"dirotq compress 'model=.*/it is'`"):
        dirotq.load(shutil.copytree(folder, tmp_path / "it is"))
    assert not caplog.records  # nothing of digests that it should have


def test_an_artifact_that_is_no_model(finished):
    with pytest.raises(ArtifactError, match=r"holds no packed pipeline.*dirotq list"):
        dirotq.load(finished["rank"].path)


@pytest.mark.parametrize("missing", ["model_index.json", "transformer/config.json", "."])
def test_no_packed_pipeline(packed_folder, missing):
    if missing == ".":
        shutil.rmtree(packed_folder)
    else:
        (packed_folder / missing).unlink()
    says = "does not exist" if missing == "." else "holds no packed pipeline"
    with pytest.raises(ArtifactError, match=says):
        dirotq.load(packed_folder)


def test_another_quantizer(packed_folder):
    file = packed_folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["quant_method"] = "gguf"
    file.write_text(json.dumps(config))
    write_sums(packed_folder)
    with pytest.raises(ArtifactError, match=r"\(quant_method 'gguf'\); pack the 16-bit model"):
        dirotq.load(packed_folder)


def test_loading_says_nothing_and_leaves_the_libraries_as_they_were(finished, capfd):
    before = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    capfd.readouterr()
    dirotq.load(finished["pack"].path)
    assert capfd.readouterr() == ("", "")
    after = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    assert after == before


def test_loading_needs_no_pickle(packed_folder):
    for weights in packed_folder.glob("vae/*.safetensors"):
        weights.rename(weights.with_suffix(".bin"))
    write_sums(packed_folder)
    with pytest.raises(ArtifactError, match=r"vae \(AutoencoderKL\) has no .*safetensors"):
        dirotq.load(packed_folder)


@pytest.mark.parametrize("keep", [0, 20, -1], ids=["empty", "header", "last-byte"])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_a_truncated_file_is_named(packed_folder, part, keep):
    (file,) = (packed_folder / part).glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=rf"{part}/{file.name} changed"):
        dirotq.load(packed_folder)
    (packed_folder / SUMS).unlink()
    with pytest.raises(ArtifactError, match=rf"{part}/{file.name} is damaged or was not written"):
        dirotq.load(packed_folder)


def test_a_pipeline_that_a_gpu_cannot_hold_takes_turns(folder, monkeypatch):
    moved = []
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        "diffusers.FluxPipeline.enable_model_cpu_offload",
        lambda self, device: moved.append("components"),
    )
    monkeypatch.setattr(
        "diffusers.FluxPipeline.enable_group_offload", lambda self, **_: moved.append("layers")
    )
    monkeypatch.setattr(
        "diffusers.FluxPipeline.to", lambda self, device: moved.append("whole") or self
    )
    sizes = component_bytes(open_pipeline(folder, torch.float32, torch.device("cpu")))
    assert sum(sizes) >= 4 * 100_000
    for needed in (sum(sizes), sum(sizes) - 1, max(sizes), max(sizes) - 1):
        free = math.ceil(needed / SHARE)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        open_pipeline(folder, torch.float32, cuda)
    # The pipeline was opened on the CPU first.
    assert moved == ["whole", "whole", "components", "components", "layers"]
