"""Nothing missing, nothing left over, and what published folders look like beside that."""

import functools
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from damaged import *  # noqa: F403
from damaged import FAMILIES, Tensors, edit, refused, rewrite, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import family_folder

from dirotq.sources.completeness import refuse_incomplete
from dirotq.sources.expected_tensors import difference


@functools.cache
def tensor_names(root: Path) -> list[tuple[str, str, str]]:
    """(family, component, tensor) of every tensor of every tiny pipeline."""
    found = []
    for family in FAMILIES:
        for file in sorted(family_folder(root, family).glob("*/*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                names = sorted(tensors.keys())
            found += [(family, file.parent.name, name) for name in names]
    return found


@settings(max_examples=15)
@given(st.data())
def test_a_single_missing_tensor_is_named(tiny_root, tmp_path_factory, data):
    family, part, name = data.draw(st.sampled_from(tensor_names(tiny_root)))
    root = tmp_path_factory.mktemp("dropped")
    folder = Path(shutil.copytree(family_folder(tiny_root, family), root / family))
    rewrite(folder / part, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    # The loaders may rename its first parts ("visual.x" is "model.visual.x" today).
    refused(folder, f"{part} (", " lacks ", ".".join(name.split(".")[-3:]))
    shutil.rmtree(root)


def test_each_component_takes_only_its_own_tensors(tiny_root, own):
    for family in FAMILIES:
        folder = own(family)
        for file in sorted(folder.glob("*/*.safetensors")):
            shutil.copyfile(file, kept := file.with_suffix(".kept"))
            rewrite(file.parent, lambda tensors: tensors | {"left.over": torch.ones(2)})
            refused(folder, f"{file.parent.name} (", "the tensor left.over", "no place for")
            kept.replace(file)
        refuse_incomplete(folder, family)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("transformer", "proj_out.weight"),
        ("vae", "decoder.conv_in.weight"),
        ("text_encoder", "encoder.layers.0.mlp.fc1.bias"),
        ("text_encoder_2", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ],
)
def test_misshapen_tensors(own, part, name):
    folder = own("flux")
    rewrite(folder / part, lambda tensors: tensors | {name: tensors[name][1:]})
    refused(folder, f"{part} (", name, "another shape than its config.json says")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.module."])
@pytest.mark.parametrize("part", ["text_encoder_2", "vae", "transformer"])
def test_a_wrapper_s_names(own, prefix, part):
    folder = own("flux")
    rewrite(folder / part, lambda tensors: {prefix + n: t for n, t in tensors.items()})
    refused(folder, f"{part} (", "lacks", f"{prefix!r} before it", "the model inside of it")


def test_dtypes_are_no_matter(own):
    folder = own("sd3")
    kinds = (torch.float32, torch.float16, torch.bfloat16)
    for file in folder.glob("*/*.safetensors"):
        rewrite(
            file.parent,
            lambda tensors: {n: t.to(kinds[i % 3]) for i, (n, t) in enumerate(tensors.items())},
        )
    refuse_incomplete(folder, "mixed")


# As folders on the hub are, beside what save_pretrained writes today.


def clip_of_old(tensors: Tensors) -> Tensors:
    """CLIP's names before transformers 5, and a buffer that was stored before 4.31."""
    renamed = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in tensors.items()}
    return renamed | {"text_model.embeddings.position_ids": torch.arange(77)[None]}


def t5_twice(tensors: Tensors) -> Tensors:
    return tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}


def t5_by_its_other_name(tensors: Tensors) -> Tensors:
    return {
        n.replace("shared.weight", "encoder.embed_tokens.weight"): t for n, t in tensors.items()
    }


def t5_with_decoder(tensors: Tensors) -> Tensors:
    return tensors | {"decoder.final_layer_norm.weight": torch.ones(64)}


def vae_of_old(tensors: Tensors) -> Tensors:
    """Attention of autoencoders before diffusers 0.18."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    return {
        functools.reduce(lambda n, k: n.replace(f".{k}.", f".{new[k]}."), new, name): t
        for name, t in tensors.items()
    }


PUBLISHED = [
    ("flux", "text_encoder", clip_of_old),
    ("flux", "text_encoder_2", t5_twice),
    ("flux", "text_encoder_2", t5_by_its_other_name),
    ("flux", "text_encoder_2", t5_with_decoder),
    ("wan", "text_encoder", t5_twice),
    ("wan", "text_encoder", t5_by_its_other_name),
    ("flux", "vae", vae_of_old),
    ("wan", "transformer", lambda t: t | {"blocks.0.attn2.norm_added_q.weight": torch.ones(64)}),
    ("flux2", "vae", lambda t: {n: x for n, x in t.items() if "num_batches_tracked" not in n}),
]


@pytest.mark.parametrize(("family", "part", "change"), PUBLISHED)
def test_forms_that_the_loaders_understand(own, family, part, change):
    folder = own(family)
    rewrite(folder / part, change)
    refuse_incomplete(folder, "published")


def test_both_names_of_a_tied_embedding_gone(own):
    folder = own("flux")
    rewrite(
        folder / "text_encoder_2", lambda t: {n: x for n, x in t.items() if n != "shared.weight"}
    )
    refused(folder, "text_encoder_2 (T5EncoderModel) lacks", "shared.weight")


def test_an_encoder_saved_as_a_whole_language_model(own):
    """Z-Image's: the pipeline names Qwen3Model, the file is a Qwen3ForCausalLM's, head and all."""
    folder = own("z_image")
    part = folder / "text_encoder"
    config = transformers.Qwen3Config.from_pretrained(part, tie_word_embeddings=False)
    shutil.rmtree(part)
    transformers.Qwen3ForCausalLM(config).save_pretrained(part)
    assert "lm_head.weight" in load_file(weights_of(part))
    refuse_incomplete(folder, "whole")
    # No class of that family has this one.
    rewrite(part, lambda t: t | {"lora_A.weight": torch.ones(1)})
    refused(folder, "the tensor lora_A.weight")


def test_a_text_encoder_saved_as_a_whole_clip(own):
    folder = own("sd3")
    part = folder / "text_encoder"
    text = transformers.CLIPTextConfig.from_pretrained(part)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 16}  # fmt: skip
    shutil.rmtree(part)
    whole = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision, projection_dim=text.projection_dim
    )
    transformers.CLIPModel(whole).save_pretrained(part)
    refuse_incomplete(folder, "whole")
    rewrite(part, lambda t: {n: x for n, x in t.items() if n != "text_projection.weight"})
    refused(folder, "text_encoder (CLIPTextModelWithProjection) lacks", "text_projection.weight")


def test_mistral_by_its_older_names(tmp_path):
    """FLUX.2's text encoder: names of transformers 4 are what is published."""
    common = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    text = common | {"intermediate_size": 32, "num_key_value_heads": 1, "vocab_size": 64}
    vision = common | {"intermediate_size": 32, "image_size": 32, "patch_size": 16}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision)
    config.save_pretrained(tmp_path)
    cls = transformers.Mistral3ForConditionalGeneration
    new = {n: tuple(t.shape) for n, t in cls(config).state_dict().items()}
    old = {_older(name): shape for name, shape in new.items()}
    assert old.keys() != new.keys()
    for names in (new, old):
        assert not difference(cls, tmp_path, names)
        lost = next(n for n in names if n.endswith("q_proj.weight"))
        found = difference(cls, tmp_path, {n: s for n, s in names.items() if n != lost})
        assert found.startswith("lacks the tensor ")


def _older(name: str) -> str:
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.")
    return f"language_model.{name}" if name.startswith("lm_head") else name.removeprefix("model.")


def test_shards_variants_and_strangers_beside_them(own):
    folder = own("sd3")
    for name, cls in (
        ("text_encoder_3", transformers.T5EncoderModel),
        ("transformer", diffusers.SD3Transformer2DModel),
        ("vae", diffusers.AutoencoderKL),
    ):
        part = folder / name
        model = cls.from_pretrained(part)
        whole = weights_of(part)
        stem = whole.stem
        shutil.copyfile(whole, part / f"{stem}.fp16.safetensors")
        whole.unlink()
        model.save_pretrained(part, max_shard_size="60KB")
        assert len(list(part.glob(f"{stem}-*.safetensors"))) > 1
        save_file({"x": torch.ones(1)}, part / "stranger.safetensors")
        save_file({"x": torch.ones(1)}, part / f"{stem}-00009-of-00099.safetensors")
    refuse_incomplete(folder, "sharded")
    shard = next((folder / "vae").glob("*-00001-of-*.safetensors"))
    shard.rename(folder / "moved")
    refused(folder, f"vae (AutoencoderKL) lacks {shard.name}")
    (folder / "moved").rename(shard)
    index = folder / "text_encoder_3" / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(places.values()))[:2]
    lost = next(n for n, file in places.items() if file == first)
    edit(index, weight_map=places | {lost: second})
    refused(folder, "index.json that looks for the tensor", lost)
    for name in ("../../x.safetensors", "model.bin", "/etc/x.safetensors"):
        edit(index, weight_map=places | {lost: name})
        refused(folder, "text_encoder_3 (T5EncoderModel)", name)
