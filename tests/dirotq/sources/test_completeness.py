"""Whole pipelines: null components, folders, what loading says."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from damaged import *  # noqa: F403
from damaged import FAMILIES, edit, refused, rewrite
from tiny_line import CALL, CAPTIONS
from tiny_pipelines import PIPELINES, family_folder
from torch import Tensor

import dirotq
from dirotq.errors import ArtifactError
from dirotq.quiet import heed, quiet
from dirotq.sources.completeness import refuse_incomplete
from dirotq.sources.opening import open_pipeline


@pytest.mark.parametrize("name", FAMILIES)
def test_pipelines_as_they_are_saved_are_complete(tiny_root, name):
    refuse_incomplete(family_folder(tiny_root, name), name)
    refuse_incomplete(family_folder(tiny_root, name), name, weights=False)


def test_a_component_without_a_folder(own):
    for part in ("scheduler", "tokenizer_2", "vae"):
        folder = own("flux")
        shutil.rmtree(folder / part)
        refused(folder, f"the {part} is listed in model_index.json, but there is no such folder")
        shutil.rmtree(folder)


def test_encoders_that_a_class_can_do_without_are_needed_for_prompts(own):
    folder = own("pixart")
    for part in ("text_encoder", "tokenizer"):
        edit(folder / "model_index.json", **{part: [None, None]})
    refused(folder, "names no text_encoder")
    refuse_incomplete(folder, "packed, for embeddings", prompts=False)


def test_sd3_without_t5_is_complete_and_loads(own):
    folder = own("sd3")
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
        edit(folder / "model_index.json", **{part: [None, None]})
    refuse_incomplete(folder, "without T5")
    pipe = open_pipeline(folder, torch.float32, torch.device("cpu"))
    assert pipe.text_encoder_3 is None
    assert pipe("dots", **PIPELINES["sd3"].call, output_type="latent").images.isfinite().all()
    edit(folder / "model_index.json", text_encoder_2=[None, None])
    refused(folder, "names no text_encoder_2")


def test_a_component_that_the_pipeline_has_no_place_for_is_said(own, caplog):
    folder = own("flux")
    edit(folder / "model_index.json", text_encoder_3=["transformers", "T5EncoderModel"])
    refuse_incomplete(folder, "more")
    assert "a FluxPipeline has no place for the text_encoder_3" in caplog.text


@pytest.mark.parametrize("ratio", ["0.75", -1, 0, 1, 2.0, [0.75], True])
def test_a_boundary_that_divides_nothing(own, ratio):
    folder = own("wan22")
    edit(folder / "model_index.json", boundary_ratio=ratio)
    refused(folder, f"boundary_ratio {ratio!r}", "a number between 0 and 1")


def test_experts_of_two_classes(own, tiny_root):
    folder, other = own("wan22"), family_folder(tiny_root, "flux") / "transformer"
    shutil.rmtree(folder / "transformer_2")
    shutil.copytree(other, folder / "transformer_2")
    edit(folder / "model_index.json", transformer_2=["diffusers", "FluxTransformer2DModel"])
    refused(folder, "the transformer_2 is a FluxTransformer2DModel", "two experts are of one class")


def test_a_denoiser_that_the_pipeline_does_not_call(own):
    folder = own("flux")
    edit(folder / "model_index.json", _class_name="StableDiffusion3Pipeline")
    refused(
        folder,
        "the transformer is a FluxTransformer2DModel, and a StableDiffusion3Pipeline calls a "
        "SD3Transformer2DModel",
    )


def test_a_repaired_folder_is_looked_at_again(own):
    folder = own("flux")
    file = folder / "tokenizer" / "tokenizer.json"
    file.rename(folder / "elsewhere")
    refused(folder, "has no tokenizer.json")
    (folder / "elsewhere").rename(file)
    refuse_incomplete(folder, "repaired")


# What loading says.


def image(pipe: Any) -> Tensor:
    noise = torch.Generator("cpu").manual_seed(1)
    return pipe(CAPTIONS[0], generator=noise, output_type="pt", **CALL).images


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("text_encoder_2", lambda t: {"module." + n: x for n, x in t.items()}, "lacks 20 tensors"),
        ("text_encoder_2", lambda t: dict(list(t.items())[:-1]), "text_encoder_2 (T5EncoderModel)"),
        ("vae", lambda t: {n: x for n, x in t.items() if "decoder.conv_out" not in n}, "conv_out"),
        ("text_encoder", lambda t: t | {"more": torch.ones(1)}, "the tensor more"),
    ],
)
def test_load_refuses_what_a_packed_folder_lacks(packed_folder, part, change, said):
    rewrite(packed_folder / part, change)
    with pytest.raises(ArtifactError) as caught:
        dirotq.load(packed_folder, verify=False)  # what lies behind the digests
    assert said in str(caught.value)


def test_load_refuses_a_lost_vocabulary(packed_folder):
    (packed_folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer \(CLIPTokenizer\) has no tokenizer.json"):
        dirotq.load(packed_folder, verify=False)


def test_two_loads_give_one_image(packed_folder):
    one, other = (image(dirotq.load(packed_folder, device="cpu")) for _ in range(2))
    assert torch.equal(one, other)


def test_the_loaders_own_word_is_heeded(own, caplog):
    """A second net below the headers: both libraries say so when they make weights up."""
    folder = own("flux")
    for part, cls in (
        ("text_encoder_2", transformers.T5EncoderModel),
        ("vae", diffusers.AutoencoderKL),
    ):
        heed(_said(cls, folder / part))
        rewrite(folder / part, lambda t: t | {"more": torch.ones(1)})
        heed(_said(cls, folder / part))
        assert "more" in caplog.text  # shown, as nothing was made up
        caplog.clear()
        rewrite(folder / part, lambda t: dict(list(t.items())[:-1]))
        rewrite(folder / part, lambda t: dict(list(t.items())[:-1]))
        with pytest.raises(ArtifactError, match="the loader made some up"):
            heed(_said(cls, folder / part))


def _said(cls: Any, part: Path) -> list[str]:
    with quiet() as said:
        cls.from_pretrained(part)
    return said
