import json
from pathlib import Path

import pytest

from dirotq.errors import ArtifactError, ConfigError, UnsupportedError
from dirotq.sources.doors import refuse_counts, refuse_doors, refuse_part
from dirotq.sources.opening import open_pipeline


@pytest.fixture
def root(tmp_path):
    index(tmp_path)
    for part in ("transformer", "text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text('{"hidden_size": 3}')
    return tmp_path


def index(root, **changes):
    values = {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.42.0",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "image_encoder": [None, None],
    }
    (root / "model_index.json").write_text(json.dumps(values | changes))


def test_what_diffusers_writes_is_let_through(root):
    refuse_doors(root)
    index(root, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    refuse_doors(root)


@pytest.mark.parametrize("name", ["../../leak", "/leak", "a/b", "..", ".hidden", ""])
def test_components_are_names(root, name):
    index(root, **{name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(ConfigError, match=r"model_index\.json names .*no plain name"):
        refuse_doors(root)


@pytest.mark.parametrize(
    ("library", "cls"),
    [("pipeline", "Mine"), ("os", "system"), ("subprocess", "Popen"), ("diffusers.utils", "x"),
     ("../x", "X"), ("", "X"), ("diffusers", "a.b"), ("FluxPipeline", "X")],
)  # fmt: skip
def test_components_of_other_libraries(root, library, cls):
    index(root, vae=[library, cls])
    with pytest.raises(UnsupportedError, match=r"component vae .*needs code of its own"):
        refuse_doors(root)


def test_a_misspelt_library(root):
    index(root, vae=["difusers", "AutoencoderKL"])
    with pytest.raises(UnsupportedError, match=r"of 'difusers'; did you mean `diffusers`\?"):
        refuse_doors(root)


@pytest.mark.parametrize("stray", ["None.py", "text_encoder/transformers.py"])
def test_code_that_diffusers_would_pick_up(root, stray):
    (root / "pipeline.py").write_text("nobody asks for it")
    (root / "text_encoder" / "modeling.py").write_text("nor for this")
    refuse_doors(root)
    (root / stray).write_text("raise SystemExit('ran')")
    with pytest.raises(UnsupportedError, match="code"):
        refuse_doors(root)


@pytest.mark.parametrize("value", [["pipeline_mine", "Mine"], None, 3])
def test_a_pipeline_class_of_its_own(root, value):
    index(root, _class_name=value)
    with pytest.raises(UnsupportedError, match=r"needs code of its own .*_class_name"):
        refuse_doors(root)


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../../../x.safetensors"])
def test_an_index_of_transformers(root, shard):
    """transformers joins the names as they are, and unpickles what is no .safetensors."""
    file = root / "text_encoder" / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    with pytest.raises(ConfigError, match=r"text_encoder/model\.safetensors\.index\.json names"):
        refuse_doors(root)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights"),
        ({"attn_implementation": "someone/kernels"}, "attn_implementation"),
        ({"text_config": [{"_attn_implementation": "someone/kernels"}]}, "_attn_implementation"),
    ],
)
def test_settings_that_fetch_something(root, settings, key):
    file = root / "text_encoder" / "config.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=rf"config\.json sets {key} to"):
        refuse_doors(root)
    file.write_text(json.dumps({"attn_implementation": "sdpa", "auto_map": {"AutoModel": "m.M"}}))
    refuse_doors(root)  # a class that does not look at auto_map


def test_a_class_that_would_ask_whether_to_run_code(root):
    file = root / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["tokenization.T", None]}}))
    refuse_doors(root)
    index(root, tokenizer=["transformers", "AutoTokenizer"])
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json sets auto_map"):
        refuse_doors(root)


def test_an_adapter_beside_the_weights(root):
    (root / "text_encoder" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds an adapter \(adapter_config\.json\)"):
        refuse_doors(root)


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 10**5, "\0"])
def test_damaged_settings(root, content):
    for file in ("text_encoder/config.json", "model_index.json"):
        (root / file).write_text(content)
        with pytest.raises(ConfigError, match=rf"{file} is (damaged|no JSON object)"):
            refuse_doors(root)


def test_a_part_that_is_not_here_yet(root):
    refuse_part(root / "vae")


def test_they_are_shut_before_anything_is_loaded(root):
    """`dirotq.load`, `generate` and the line open folders by this one function."""
    index(root, vae=["os", "system"])
    with pytest.raises(UnsupportedError, match="component vae"):
        open_pipeline(root, None, None)


@pytest.mark.parametrize(
    ("settings", "tensors"),
    [
        ({"num_layers": 513}, 5),
        ({"vision_config": {"depth": 2001}}, 2000),
        ({"blocks": [0] * 513}, 5),
        ({"block": {"num_layers": [1, 513]}}, 5),
    ],
)
def test_counts_are_held_against_the_number_of_tensors(settings, tensors):
    with pytest.raises(ArtifactError, match=rf"= {max(tensors, 512) + 1}, more than what has"):
        refuse_counts(Path("config.json"), settings, tensors)
    refuse_counts(Path("config.json"), settings, max(tensors, 512) + 1)
    refuse_counts(Path("config.json"), settings | {"vocab_size": 10**9}, 0)  # none are known
