import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sources import *  # noqa: F403
from tiny_sources import Q, model, noise, tensors_of

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.pipeline.stage import recipe


def test_a_single_file_with_the_names_of_diffusers(folder, finetune):
    made = model(finetune, base=str(folder))
    after, before = tensors_of(made.folder()), tensors_of(folder)
    assert all(torch.equal(after[n], before[n] * 1.5) for n in before)
    assert made.sites() == model(folder).sites()
    assert made.call_arguments() == model(folder).call_arguments()


def test_a_single_file_with_a_lora(folder, finetune, lora):
    after = tensors_of(model(finetune, base=str(folder), lora=str(lora())).folder())
    weight = load_file(finetune)[f"{Q}.weight"]
    rows, width = weight.shape
    want = weight.float() + (noise(rows, 4) / 10) @ noise(4, width)
    assert torch.equal(after[f"{Q}.weight"], want.to(weight.dtype))


def test_the_replaced_weights_do_not_count(own_folder, finetune):
    made = model(finetune, base=str(own_folder))
    before = recipe(made)
    (weights,) = (own_folder / "transformer").glob("*.safetensors")
    weights.unlink()
    assert recipe(made) == before
    assert made.folder().is_dir()


def sd3(**changes):
    from diffusers import SD3Transformer2DModel

    config = {
        "sample_size": 8, "patch_size": 2, "in_channels": 4, "num_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 24,
        "caption_projection_dim": 16, "pooled_projection_dim": 32, "out_channels": 4,
        "pos_embed_max_size": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    return SD3Transformer2DModel(**config | changes)


@pytest.fixture
def sd3_base(tmp_path, monkeypatch):
    """A pipeline folder of which only the transformer's configuration is real."""
    monkeypatch.setattr("dirotq.sources.origin.refuse_incomplete", lambda *_, **__: None)
    base = tmp_path / "sd3"
    sd3().save_config(base / "transformer")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "transformer": ["diffusers", "SD3Transformer2DModel"],
    }
    (base / "model_index.json").write_text(json.dumps(index))
    return base


def original_sd3(transformer) -> dict[str, torch.Tensor]:
    """The names of Stability's code, written down independently of diffusers' converter."""
    state = transformer.state_dict()
    names = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
    }
    made = {}
    for name, short in names.items():
        for key in [k for k in state if k == name or k.startswith(f"{name}.")]:
            made[short + key.removeprefix(name)] = state[key]
    for leaf in ("weight", "bias"):
        # Stability: shift, scale; diffusers: scale, shift.
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        made[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
        for i in (0, 1):
            old, new = f"transformer_blocks.{i}", f"joint_blocks.{i}"
            qkv = [state[f"{old}.attn.to_{x}.{leaf}"] for x in "qkv"]
            added = [state[f"{old}.attn.add_{x}_proj.{leaf}"] for x in "qkv"]
            made[f"{new}.x_block.attn.qkv.{leaf}"] = torch.cat(qkv)
            made[f"{new}.context_block.attn.qkv.{leaf}"] = torch.cat(added)
            made[f"{new}.x_block.attn.proj.{leaf}"] = state[f"{old}.attn.to_out.0.{leaf}"]
            made[f"{new}.x_block.adaLN_modulation.1.{leaf}"] = state[f"{old}.norm1.linear.{leaf}"]
            made[f"{new}.x_block.mlp.fc1.{leaf}"] = state[f"{old}.ff.net.0.proj.{leaf}"]
            made[f"{new}.x_block.mlp.fc2.{leaf}"] = state[f"{old}.ff.net.2.{leaf}"]
            context = state[f"{old}.norm1_context.linear.{leaf}"]
            if i == 1:  # the last block only reads the text
                context = torch.cat(context.chunk(2)[::-1])
            made[f"{new}.context_block.adaLN_modulation.1.{leaf}"] = context
        made[f"joint_blocks.0.context_block.attn.proj.{leaf}"] = state[
            f"transformer_blocks.0.attn.to_add_out.{leaf}"
        ]
        for old, new in (("net.0.proj", "fc1"), ("net.2", "fc2")):
            made[f"joint_blocks.0.context_block.mlp.{new}.{leaf}"] = state[
                f"transformer_blocks.0.ff_context.{old}.{leaf}"
            ]
    return {name: tensor.clone() for name, tensor in made.items()}


PREFIX = "model.diffusion_model."


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_single_file_with_the_original_names(sd3_base, tmp_path, prefix, caplog):
    transformer = sd3()
    file = tmp_path / "original.safetensors"
    tensors = {prefix + name: tensor for name, tensor in original_sd3(transformer).items()}
    more = {"first_stage_model.x": torch.ones(2)} if prefix else {}  # a whole pipeline's file
    save_file(tensors | more, file)
    after = tensors_of(model(file, base=str(sd3_base)).folder())
    state = transformer.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    said = "1 of its tensors (first_stage_model) are not used"
    assert (said in caplog.text) == bool(prefix)


@pytest.mark.parametrize(
    "extra",
    [
        "joint_blocks.0.x_block.attn2.proj.weight",
        "joint_blocks.0.x_block.mlp.fc1.scale_weight",
        "joint_blocks.9.x_block.mlp.fc1.lora_A.weight",
        "controlnet.x",
    ],
)
def test_what_the_converter_passes_over_is_refused(sd3_base, tmp_path, extra):
    file = tmp_path / "more.safetensors"
    save_file(original_sd3(sd3()) | {extra: torch.ones(2)}, file)
    with pytest.raises(ConfigError, match=r"1 differences, first .* is used nowhere|is missing"):
        model(file, base=str(sd3_base)).folder()


@pytest.mark.parametrize("diffusers_names", [True, False])
def test_tensors_with_and_without_the_prefix(sd3_base, tmp_path, diffusers_names):
    made = dict(sd3().state_dict()) if diffusers_names else original_sd3(sd3())
    file = tmp_path / "both.safetensors"
    prefixed = {PREFIX + name: tensor for name, tensor in made.items()}
    save_file(prefixed, file)
    assert model(file, base=str(sd3_base)).folder().is_dir()
    name = next(name for name in made if "blocks.1" in name)
    save_file(prefixed | {name: made[name] * 2}, file)
    with pytest.raises(ConfigError, match=r"with the prefix .* and without it, such as \w*blocks"):
        model(file, base=str(sd3_base)).folder()


def test_a_single_file_of_whole_numbers(folder, finetune, tmp_path):
    name = f"{Q}.weight"
    tensors = load_file(finetune)
    save_file(tensors | {name: torch.ones(64, 64, dtype=torch.int32)}, finetune)
    with pytest.raises(UnsupportedError, match=rf"{name} is stored as I32"):
        model(finetune, base=str(folder)).folder()


def test_a_single_file_of_another_architecture(folder, sd3_base, finetune):
    with pytest.raises(
        ConfigError, match=r"does not fit the SD3Transformer2DModel.*is missing.*FLUX\.1-schnell"
    ):
        model(finetune, base=str(sd3_base)).folder()


def test_what_does_not_fit_is_told_before_anything_runs(folder, sd3_base, finetune, lora, cache):
    model(finetune, base=str(folder)).check()
    with pytest.raises(ConfigError, match=r"does not fit the SD3Transformer2DModel"):
        model(finetune, base=str(sd3_base)).check()
    model(folder, lora=str(lora())).check()
    with pytest.raises(ConfigError, match=finetune.name):  # a whole model as a LoRA
        model(folder, lora=str(finetune)).check()
    assert not (cache / "sources").exists()


def test_a_single_file_of_another_size(sd3_base, tmp_path):
    file = tmp_path / "deep.safetensors"
    save_file(dict(sd3(num_layers=3).state_dict()), file)
    with pytest.raises(ConfigError, match=r"transformer_blocks\.\d.*model\.base=FOLDER"):
        model(file, base=str(sd3_base)).folder()


@pytest.mark.parametrize(
    ("names", "like"),
    [
        (["transformer.x.lora_A.weight"], r"a LoRA \(give it as model\.lora"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a UNet"),
        (["something.else"], r"nothing known \(its tensors are \['something\.else'\]"),
    ],
)
def test_a_file_that_is_no_transformer_says_what_it_looks_like(tmp_path, names, like):
    save_file({name: torch.ones(2, 2) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=f"looks like {like}"):
        model(tmp_path / "x.safetensors").identity()


def test_the_base_of_a_finetune_is_its_familys_original(finetune, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"black-forest-labs/FLUX\.1-schnell .*hf download"):
        model(finetune).identity()


def test_other_files_are_refused(tmp_path, folder):
    for name, error, message in (
        ("m.gguf", UnsupportedError, "GGUF file"),
        ("m.ckpt", ConfigError, "pickle"),
        ("m.zip", UnsupportedError, "a kind that DiRotQ does not read"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(error, match=message):
            model(tmp_path / name).identity()
    with pytest.raises(ConfigError, match="there is no such file"):
        model(tmp_path / "absent.safetensors").identity()
    with pytest.raises(ConfigError, match=r"model\.base=x is for a model in a single"):
        model(folder, base="x").identity()
    file = tmp_path / "fp8.safetensors"
    save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, file)
    with pytest.raises(UnsupportedError, match="already quantized: x is stored as F8_E4M3"):
        model(file, base=str(folder)).identity()
