"""Settings of components, and what is made of settings alone."""

import json
from pathlib import Path

import pytest
import torch
from damaged import *  # noqa: F403
from damaged import edit, refused
from safetensors.torch import save_file

from dirotq.errors import ConfigError
from dirotq.sources.completeness import refuse_incomplete

DAMAGE = [
    ("vae/config.json", {"scaling_factor": "0.2"}, "scaling_factor: '0.2'"),
    ("vae/config.json", {"scaling_factor": float("nan")}, "a value is NaN"),
    ("vae/config.json", {"scaling_factor": float("inf")}, "scaling_factor: inf"),
    ("vae/config.json", {"block_out_channels": [7, 9]}, "can't be built by its config.json"),
    ("vae/config.json", {"latent_channels": -3}, "can't be built by its config.json"),
    ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "contradict each other"),
    ("text_encoder/config.json", {"hidden_size": "wide"}, "can't be built by its config.json"),
    ("text_encoder/config.json", {"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000"),
    ("text_encoder/config.json", {"num_hidden_layers": 2}, "lacks 16 tensors"),
    ("transformer/config.json", {"num_layers": 2}, "lacks 32 tensors (transformer_blocks.1."),
    ("transformer/config.json", {"num_layers": 0}, "holds 32 tensors (transformer_blocks.0."),
    ("scheduler/scheduler_config.json", {"shift": "far"}, "shift: 'far'"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}, "can't be made of its folder"),
    ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "contradict"),
    ("model_index.json", {"vae": [None, None]}, "names no vae"),
    ("model_index.json", {"vae": ...}, "names no vae"),
    ("model_index.json", {"text_encoder_2": [None, None]}, "names no text_encoder_2"),
    ("model_index.json", {"scheduler": [None, None]}, "names no scheduler"),
    ("model_index.json", {"vae": "AutoencoderKL"}, "where [library, class] belongs"),
    ("model_index.json", {"vae": ["diffusers"]}, "where [library, class] belongs"),
    ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "contradict each other"),
    ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "lacks"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "change", "said"), DAMAGE)
def test_configurations_that_cannot_be_right(own, file, change, said):
    folder = own("flux")
    edit(folder / file, **change)
    refused(folder, said)


@pytest.mark.parametrize(
    "file",
    ["vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
     "tokenizer/tokenizer_config.json"],
)  # fmt: skip
def test_configurations_that_are_damaged_or_gone(own, file):
    folder = own("flux")
    for content in ("{", "[]", "\x00"):
        (folder / file).write_text(content)
        refused(folder, Path(file).name)
    (folder / file).unlink()
    refused(folder, Path(file).name)


@pytest.mark.parametrize("content", ["{", "[]", '{"_class_name": NaN}'])
def test_an_index_that_is_damaged(own, content):
    folder = own("flux")
    (folder / "model_index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model_index\.json is"):
        refuse_incomplete(folder, "the model")


def test_infinity_where_a_scheduler_writes_it(own):
    folder = own("pixart")
    file = folder / "scheduler" / "scheduler_config.json"
    assert json.loads(file.read_text())["lambda_min_clipped"] == float("-inf")
    refuse_incomplete(folder, "as published")


def test_schedulers_of_one_kind_read_each_other(own):
    folder = own("pixart")
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    refuse_incomplete(folder, "with the scheduler that someone put in its place")


def test_a_lora_file_beside_a_component(own, caplog):
    folder = own("flux")
    part = folder / "transformer"
    save_file({"x": torch.ones(1)}, part / "diffusion_pytorch_model.fp16.safetensors")
    refuse_incomplete(folder, "with a variant")
    assert not caplog.text
    save_file({"x": torch.ones(1)}, part / "other.safetensors")
    refuse_incomplete(folder, "with a stranger")
    assert "other.safetensors is not read" in caplog.text
    save_file({"x.lora_A.weight": torch.ones(1)}, part / "pytorch_lora_weights.safetensors")
    refused(folder, "give pytorch_lora_weights.safetensors as model.lora")


def test_a_class_that_is_no_component(own):
    folder = own("flux")
    edit(folder / "model_index.json", text_encoder=["transformers", "AutoModel"])
    refused(folder, "text_encoder (")


@pytest.mark.parametrize(
    ("part", "entry", "said"),
    [
        ("text_encoder", ["transformers", "pipeline"], r"the text_encoder is a 'pipeline', which"),
        ("text_encoder", ["diffusers", "utils"], r"which is no class of the installed diffusers"),
        ("vae", ["diffusers", "Nope"], r"the vae is a 'Nope', which is no class of the installed"),
    ],
)
def test_classes_that_are_not_there(own, part, entry, said):
    folder = own("flux")
    edit(folder / "model_index.json", **{part: entry})
    with pytest.raises(ConfigError, match=f"can't be opened here: .*{said}"):
        refuse_incomplete(folder, "the model")


@pytest.mark.parametrize(
    ("part", "library", "saved", "entry"),
    [
        ("vae", "diffusers", "_diffusers_version", ["diffusers", "AutoencoderKLFuture"]),
        ("text_encoder_2", "transformers", "transformers_version", ["transformers", "T9Model"]),
    ],
)
def test_classes_of_a_newer_library_name_its_version(own, part, library, saved, entry):
    folder = own("flux")
    edit(folder / "model_index.json", **{part: entry})
    edit(folder / part / "config.json", **{saved: "99.1.0"})
    with pytest.raises(
        ConfigError, match=rf"saved by 99\.1\.0: pip install -U '{library}>=99"
    ) as e:
        refuse_incomplete(folder, "the model")
    assert "Download" not in str(e.value)  # which would not help


def test_a_pipeline_that_is_not_there(own):
    folder = own("flux")
    edit(folder / "model_index.json", _class_name="FluxxPipeline", _diffusers_version="99.1.0")
    with pytest.raises(ConfigError, match=r"'FluxxPipeline', which is none of .*diffusers>=99\.1"):
        refuse_incomplete(folder, "the model")


def test_settings_that_a_class_does_not_know(own, caplog):
    """diffusers leaves them out: of an older one's files leftovers, of a newer one's a change."""
    folder = own("flux")
    file = folder / "transformer" / "config.json"
    edit(file, gated_attention=True, new_switch=False)
    refuse_incomplete(folder, "as older ones left it")
    assert "a FluxTransformer2DModel has no setting gated_attention = True" in caplog.text
    assert "new_switch" not in caplog.text
    edit(file, _diffusers_version="99.1.0")
    refused(folder, "does not know: gated_attention = True, of the installed", "diffusers>=99.1.0")
    edit(file, gated_attention=None)
    refuse_incomplete(folder, "what is switched off changes nothing")
