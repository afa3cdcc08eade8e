"""Text encoders of every kind that pipelines have, from tiny random configurations."""

import functools
import json

import pytest
import torch
import transformers
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file, save_file
from tiny_offload import absent
from torch import nn

from dirotq.errors import ArtifactError, NumericalError, UnsupportedError
from dirotq.kernels.weight_only import WeightOnlyEmbedding, WeightOnlyLinear
from dirotq.packed.text_encoders import choose, packed_bits
from dirotq.packed.text_quantizer import TextEncoderConfig, packable, token_embeddings

SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 99}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
LANGUAGE = SIZE | HEADS | {"head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 64, "intermediate_size": 96, "depth": 1, "num_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}


def t5(name):
    kind = getattr(transformers, f"{name}Config")
    config = kind(
        vocab_size=99, d_model=64, d_kv=32, d_ff=96, num_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return getattr(transformers, f"{name}EncoderModel")(config)


def clip(name):
    config = transformers.CLIPTextConfig(
        **SIZE, num_attention_heads=2, max_position_embeddings=20, projection_dim=32
    )
    return getattr(transformers, name)(config)


def qwen_vl():
    config = transformers.Qwen2_5_VLConfig(
        text_config=LANGUAGE | {"rope_parameters": ROPE},
        vision_config=VISION | {"out_hidden_size": 64, "fullatt_block_indexes": [0]},
        image_token_id=90, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def causal(name, kind="ForCausalLM", **more):
    config = getattr(transformers, f"{name}Config")(**LANGUAGE, **more)
    return getattr(transformers, f"{name}{kind}")(config)


BUILD = {
    # class: how it is built, and linears in its blocks
    "T5EncoderModel": (functools.partial(t5, "T5"), 14),
    "UMT5EncoderModel": (functools.partial(t5, "UMT5"), 14),
    "CLIPTextModel": (functools.partial(clip, "CLIPTextModel"), 12),
    "CLIPTextModelWithProjection": (functools.partial(clip, "CLIPTextModelWithProjection"), 12),
    "Qwen2_5_VLForConditionalGeneration": (qwen_vl, 14 + 5),
    "MistralForCausalLM": (functools.partial(causal, "Mistral"), 14),
    "Gemma2ForCausalLM": (functools.partial(causal, "Gemma2"), 14),
    "Gemma2Model": (functools.partial(causal, "Gemma2", "Model"), 14),
    "Qwen3ForCausalLM": (functools.partial(causal, "Qwen3", tie_word_embeddings=True), 14),
}
EMBEDDINGS = {
    "T5EncoderModel": ["shared", "encoder.embed_tokens"],
    "UMT5EncoderModel": ["shared", "encoder.embed_tokens"],
    "CLIPTextModel": ["embeddings.token_embedding"],
    "CLIPTextModelWithProjection": ["text_model.embeddings.token_embedding"],
    "Qwen2_5_VLForConditionalGeneration": ["model.language_model.embed_tokens"],
    "MistralForCausalLM": ["model.embed_tokens"],
    "Gemma2ForCausalLM": ["model.embed_tokens", "lm_head"],
    "Gemma2Model": ["embed_tokens"],
    "Qwen3ForCausalLM": ["model.embed_tokens", "lm_head"],
}


@functools.cache
def network(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILD[name][0]().eval().bfloat16()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(class, bits) -> folder of the packed network, written once."""

    @functools.cache
    def write(name, bits):
        root = tmp_path_factory.mktemp("encoders")
        network(name).save_pretrained(root / "whole")
        config = TextEncoderConfig(bits=bits)
        made = type(network(name)).from_pretrained(
            root / "whole", quantization_config=config, dtype=torch.bfloat16
        )
        made.save_pretrained(root / "packed")
        return root / "packed"

    return write


def run(made, tokens, mask=None):
    with torch.no_grad():
        found = made(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    return found.hidden_states[-1].float()


TOKENS = torch.randint(3, 89, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", BUILD)
def test_every_class_is_packed_saved_and_restored(name, bits, packed):
    cls, folder = type(network(name)), packed(name, bits)
    made, info = cls.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    inside = {n: m for n, m in made.named_modules() if isinstance(m, WeightOnlyLinear)}
    assert len(inside.keys() - EMBEDDINGS[name]) == BUILD[name][1]
    output = made.get_output_embeddings()
    assert output is None or (type(output) is nn.Linear) == ("lm_head" not in inside)
    looked_up, *sharing = (made.get_submodule(path) for path in EMBEDDINGS[name])
    assert isinstance(looked_up, WeightOnlyEmbedding) and looked_up.weight.dtype == torch.int8
    assert all(m.weight is looked_up.weight and m.scale is looked_up.scale for m in sharing)
    want = run(network(name), TOKENS)
    lost = (run(made, TOKENS) - want).norm() / want.norm()
    assert 0 < lost < (0.06 if bits == 8 else 0.5)
    wide = cls.from_pretrained(folder, dtype=torch.float32)
    assert (made.dtype, wide.dtype) == (torch.bfloat16, torch.float32)  # which pipelines ask for
    wide.save_pretrained(folder.parent / "again")
    again, first = (load_file(f / "model.safetensors") for f in (folder.parent / "again", folder))
    assert again.keys() == first.keys()
    assert all(
        again[key].dtype == t.dtype and torch.equal(again[key], t) for key, t in first.items()
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["T5EncoderModel", "Qwen2_5_VLForConditionalGeneration"])
def test_padding_under_a_mask_changes_nothing(name, bits, packed):
    made = type(network(name)).from_pretrained(packed(name, bits), dtype=torch.float32)
    mask = torch.ones_like(TOKENS)
    mask[1, 5:] = 0
    other = torch.where(mask.bool(), TOKENS, 7)
    assert torch.equal(run(made, TOKENS, mask)[mask.bool()], run(made, other, mask)[mask.bool()])
    assert not torch.equal(run(made, TOKENS), run(made, other))


def test_t5_in_float16_keeps_the_range_that_it_asks_for(packed):
    made = transformers.T5EncoderModel.from_pretrained(
        packed("T5EncoderModel", 4), dtype=torch.float16
    )
    widened = {n.rpartition(".")[2] for n, m in made.named_modules() if getattr(m, "widens", False)}
    assert widened == {"wo"}
    assert run(made, TOKENS).isfinite().all()


@pytest.mark.parametrize(
    "changes, error, says",
    [
        ({"format": 4}, UnsupportedError, "reads up to 3"),
        ({"format": 2}, ArtifactError, "format 2"),
        ({"embeddings": [1]}, ArtifactError, r"embeddings \[1\]"),
        ({"embeddings": ["encoder.final_layer_norm"]}, ArtifactError, "no embedding of"),
        ({"format": "1"}, ArtifactError, "damaged"),
        ({"bits": 5}, ArtifactError, "bits 5"),
        ({"linears": "all"}, ArtifactError, "linears 'all'"),
        ({"linears": ["encoder.block.9.layer.0.SelfAttention.q"]}, ArtifactError, "no linear of"),
        ({"linears": ["shared"]}, ArtifactError, "no linear of"),
    ],
)
def test_a_damaged_config(changes, error, says, packed, tmp_path):
    folder = packed("T5EncoderModel", 4)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(error, match=says):
        transformers.T5EncoderModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_damaged_scales(value, packed, tmp_path):
    folder = packed("T5EncoderModel", 4)
    tensors = load_file(folder / "model.safetensors")
    name = next(key for key in tensors if key.endswith(".scale"))
    tensors[name][0, 0] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ArtifactError, match="scale holds"):
        transformers.T5EncoderModel.from_pretrained(tmp_path)


def test_weights_that_are_not_finite(tmp_path):
    made = t5("T5")
    made.encoder.block[0].layer[0].SelfAttention.q.weight.data[0, 0] = float("nan")
    made.save_pretrained(tmp_path)
    with pytest.raises((NumericalError, RuntimeError), match=r"NaN|conversion"):
        transformers.T5EncoderModel.from_pretrained(
            tmp_path, quantization_config=TextEncoderConfig(bits=4)
        )


def test_weights_that_no_file_has_are_refused(tmp_path):
    """They are not packed as whatever was in memory."""
    t5("T5").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    lost = "encoder.block.0.layer.0.SelfAttention.q"
    del stored[f"{lost}.weight"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=rf"{lost}\.weight is stored as torch\.bfloat16"):
        transformers.T5EncoderModel.from_pretrained(
            tmp_path, quantization_config=TextEncoderConfig(bits=8), dtype=torch.bfloat16
        )


def pipeline_of(folder, model, library="transformers"):
    """A pipeline's folder with this text encoder alone."""
    model.save_pretrained(folder / "text_encoder")
    index = {"_class_name": "FluxPipeline", "text_encoder": [library, type(model).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_class_without_linears_in_blocks_is_kept_and_said(tmp_path, caplog):
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=99, n_embd=64, n_layer=1, n_head=2)
    )
    chosen = choose(pipeline_of(tmp_path, gpt), "w4")["text_encoder"]
    assert chosen.bits is None and "no linears in repeated blocks" in chosen.why
    assert "text_encoder (GPT2LMHeadModel) stays in 16 bits" in caplog.text


def test_an_encoder_that_is_quantized_already_is_kept(packed, tmp_path):
    folder = pipeline_of(tmp_path, network("T5EncoderModel"))
    assert choose(folder, "w8")["text_encoder"].bits == 8
    assert choose(folder, "keep") == {}
    (folder / "text_encoder" / "config.json").write_bytes(
        (packed("T5EncoderModel", 4) / "config.json").read_bytes()
    )
    assert "quantized already" in choose(folder, "w8")["text_encoder"].why
    assert packed_bits(folder / "text_encoder") == 4


def test_folders_without_packed_embeddings_load(tmp_path):
    """Those of format 1, and 4-bit ones of format 2."""
    like = network("T5EncoderModel")
    like.save_pretrained(tmp_path / "whole")
    for bits, format in ((8, 1), (4, 2)):
        config = TextEncoderConfig(bits=bits, linears=packable(like, bits))
        made = type(like).from_pretrained(tmp_path / "whole", quantization_config=config)
        made.save_pretrained(tmp_path / "packed")
        saved = json.loads((tmp_path / "packed" / "config.json").read_text())
        assert saved["quantization_config"].keys() == {"quant_method", "format", "bits", "linears"}
        assert saved["quantization_config"]["format"] == format
        again = type(like).from_pretrained(tmp_path / "packed")
        assert type(again.shared) is nn.Embedding
        assert torch.equal(run(again, TOKENS), run(made, TOKENS))


def test_rows_can_be_added_to_embeddings_in_16_bits(packed, tmp_path, caplog):
    """As textual inversions do, which write them."""
    folder = packed("CLIPTextModel", 8)
    made = transformers.CLIPTextModel.from_pretrained(folder, dtype=torch.float32)
    before = run(made, TOKENS)
    made.resize_token_embeddings(101, mean_resizing=False)
    made.get_input_embeddings().weight.data[100] = 1.0
    assert "in 16 bits again" in caplog.text
    assert torch.equal(run(made, TOKENS), before)
    made.save_pretrained(tmp_path)
    again = transformers.CLIPTextModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.get_input_embeddings().weight[100].eq(1).all()
    torch.testing.assert_close(run(again, TOKENS), before, rtol=0.02, atol=0.02)  # bf16 rows
    tied = transformers.T5EncoderModel.from_pretrained(packed("T5EncoderModel", 8))
    with pytest.raises(UnsupportedError, match=r"can't be resized: shared, encoder\.embed_tokens"):
        tied.resize_token_embeddings(101)


def test_casts_of_the_network_are_those_of_its_embeddings(packed):
    made = transformers.T5EncoderModel.from_pretrained(packed("T5EncoderModel", 8))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        made.to(dtype)
        assert made.dtype == made.shared(TOKENS).dtype == dtype
        assert made.shared.weight.dtype == torch.int8
        assert made.shared.scale is made.encoder.embed_tokens.scale


@pytest.mark.parametrize("name", ["T5EncoderModel", "Qwen3ForCausalLM", "MistralForCausalLM"])
def test_shared_weights_that_come_layer_by_layer(name, packed, monkeypatch):
    made = type(network(name)).from_pretrained(packed(name, 4), dtype=torch.float32)
    want = run(made, TOKENS)
    logits = made(TOKENS).logits if name != "T5EncoderModel" else want
    absent(monkeypatch)
    cpu = torch.device("cpu")
    apply_group_offloading(made, cpu, cpu, offload_type="leaf_level")
    assert torch.equal(run(made, TOKENS), want)
    got = made(TOKENS).logits if name != "T5EncoderModel" else want
    assert torch.equal(got, logits)


def test_shared_weights_that_wait_on_the_disk(packed, tmp_path):
    pytest.importorskip("accelerate", minversion="1.15", reason="older ones lose where they are")
    folder, parts = packed("T5EncoderModel", 4), ("embed_tokens", "final_layer_norm", "dropout")
    places = {f"encoder.{part}": "cpu" for part in (*parts, "block.0")}
    places |= {"shared": "disk", "encoder.embed_tokens": "disk", "encoder.block.1": "disk"}
    made = transformers.T5EncoderModel.from_pretrained(
        folder, dtype=torch.float32, device_map=places, offload_folder=tmp_path
    )
    want = transformers.T5EncoderModel.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(run(made, TOKENS), run(want, TOKENS))


@pytest.mark.parametrize(
    "build, why",
    [
        (lambda: gemma4(), "embed_tokens is a Gemma4TextScaledWordEmbedding"),
        (lambda: sharing(), "are one module"),
    ],
)
def test_embeddings_that_are_read_otherwise_stay(build, why):
    paths, said = token_embeddings(build())
    assert not paths and why in said


def gemma4():
    """Its network reads a row of the weights itself."""
    with torch.device("meta"):
        config = LANGUAGE | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 9}
        return transformers.Gemma4TextModel(transformers.Gemma4TextConfig(**config))


def sharing():
    made = t5("T5")
    made.encoder.embed_tokens = made.shared
    return made


def test_embeddings_that_stay_are_said(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr("dirotq.packed.text_quantizer.takes_embedding", lambda module: False)
    folder = pipeline_of(tmp_path, network("CLIPTextModel"))
    chosen = choose(folder, "w8")["text_encoder"]
    assert chosen.bits == 8 and "embeddings of the text_encoder (CLIPTextModel) stay" in caplog.text


@pytest.mark.parametrize("name", BUILD)
def test_the_size_that_is_told_is_that_of_the_files(name, packed, tmp_path):
    folder = pipeline_of(tmp_path, network(name))
    tensors = load_file(packed(name, 4) / "model.safetensors")
    told = choose(folder, "w4")["text_encoder"].size
    assert told == sum(t.nbytes for t in tensors.values())


def test_linears_with_tied_weights_and_what_stands_around_the_blocks_stay(packed):
    names = packable(network("Qwen3ForCausalLM"), 4)
    assert names and all(".layers." in name for name in names)
    assert "text_projection" not in packable(network("CLIPTextModelWithProjection"), 4)
