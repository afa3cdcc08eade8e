"""Text encoders of every kind that pipelines have, from tiny random configurations."""

import functools
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from dirotq.errors import ArtifactError, NumericalError, UnsupportedError
from dirotq.kernels.weight_only import WeightOnlyLinear
from dirotq.packed.text_encoders import choose, packed_bits
from dirotq.packed.text_quantizer import TextEncoderConfig, packable

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


def causal(name, **more):
    config = getattr(transformers, f"{name}Config")(**LANGUAGE, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config)


BUILD = {
    # class: how it is built, and linears in its blocks
    "T5EncoderModel": (functools.partial(t5, "T5"), 14),
    "UMT5EncoderModel": (functools.partial(t5, "UMT5"), 14),
    "CLIPTextModel": (functools.partial(clip, "CLIPTextModel"), 12),
    "CLIPTextModelWithProjection": (functools.partial(clip, "CLIPTextModelWithProjection"), 12),
    "Qwen2_5_VLForConditionalGeneration": (qwen_vl, 14 + 5),
    "MistralForCausalLM": (functools.partial(causal, "Mistral"), 14),
    "Gemma2ForCausalLM": (functools.partial(causal, "Gemma2"), 14),
    "Qwen3ForCausalLM": (functools.partial(causal, "Qwen3", tie_word_embeddings=True), 14),
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
    inside = [m for m in made.modules() if isinstance(m, WeightOnlyLinear)]
    assert len(inside) == BUILD[name][1]
    output = made.get_output_embeddings()
    assert output is None or type(output) is nn.Linear
    want = run(network(name), TOKENS)
    lost = (run(made, TOKENS) - want).norm() / want.norm()
    assert 0 < lost < (0.06 if bits == 8 else 0.5)
    cls.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder.parent / "again")
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
        ({"format": 3}, UnsupportedError, "reads up to 2"),
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


def test_tied_weights_and_what_stands_around_the_blocks_stay(packed):
    names = packable(network("Qwen3ForCausalLM"), 4)
    assert names and all(".layers." in name for name in names)
    assert "text_projection" not in packable(network("CLIPTextModelWithProjection"), 4)
