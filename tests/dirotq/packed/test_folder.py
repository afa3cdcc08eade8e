import json
import pickle
import re

import diffusers
import pytest
import torch
from fuzz_packed import load_odd, odd_settings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dirotq
from dirotq.errors import ArtifactError, ConfigError, UnsupportedError
from dirotq.files.sums import SUMS, write_sums
from dirotq.sources.opening import explained


def edit(folder, file, **changes) -> None:
    """Change settings of a packed folder, with digests that fit."""
    values = json.loads((folder / file).read_text())
    values = {k: v for k, v in (values | changes).items() if v is not ...}
    (folder / file).write_text(json.dumps(values))
    write_sums(folder)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_odd_settings_end_in_our_own_errors(finished, data):
    folder = finished["pack"].data / "model"
    dirotq.load(folder, device="cpu")  # what is imported now costs no try its time
    load_odd(folder, data.draw(odd_settings(folder)))


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "\xff"])
def test_settings_that_are_no_object(packed_folder, file, text):
    (packed_folder / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError, match=rf"{file} changed.*verify=False"):
        dirotq.load(packed_folder)
    (packed_folder / SUMS).unlink()
    with pytest.raises(ConfigError, match=rf"{file} is damaged .*|{file} is no JSON object"):
        dirotq.load(packed_folder)


@pytest.mark.parametrize("name", ["../../leak", "/etc", "a/b", "", "..", "x\0"], ids=repr)
def test_components_have_plain_names(packed_folder, name):
    edit(packed_folder, "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    with pytest.raises(ConfigError, match="which is no plain name"):
        dirotq.load(packed_folder)


@pytest.mark.parametrize("value", [[], ["diffusers"], [1, 2], ["diffusers", None], {"a": 1}])
def test_components_have_a_library_and_a_class(packed_folder, value):
    edit(packed_folder, "model_index.json", vae=value)
    with pytest.raises(ArtifactError, match=r"of the vae, where \[library, class\] belongs"):
        dirotq.load(packed_folder)


@pytest.mark.parametrize("library", ["os", "antigravity", "my_code", "..", "FluxPipeline.x"])
def test_no_other_library_is_imported(packed_folder, library, monkeypatch):
    edit(packed_folder, "model_index.json", vae=[library, "AutoencoderKL"])
    monkeypatch.setattr(
        diffusers.DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("opened")
    )
    with pytest.raises(UnsupportedError, match="only components of diffusers and transformers"):
        dirotq.load(packed_folder)


@pytest.mark.parametrize("cls", [["code", "Pipe"], None, 3])
def test_no_pipeline_brings_code(packed_folder, cls):
    edit(packed_folder, "model_index.json", _class_name=cls)
    with pytest.raises(UnsupportedError, match="only pipelines of diffusers itself"):
        dirotq.load(packed_folder)


def test_no_component_brings_code(packed_folder):
    edit(packed_folder, "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
    edit(packed_folder, "tokenizer/tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", ""]})
    with pytest.raises(ConfigError, match="auto_map"):
        dirotq.load(packed_folder)


@pytest.mark.parametrize(
    "shard", ["../vae/diffusion_pytorch_model.safetensors", "/etc/x", "x.bin", 7, None]
)
@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_shards_lie_beside_their_index(packed_folder, part, shard):
    stem = "diffusion_pytorch_model" if part == "transformer" else "model"
    index = packed_folder / part / f"{stem}.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": shard}}))
    (packed_folder / part / "x.bin").write_bytes(pickle.dumps({}))
    write_sums(packed_folder)
    with pytest.raises(ConfigError, match=r"index.json names .*(no plain name|safetensors files)"):
        dirotq.load(packed_folder)


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("transformer/config.json", {"num_layers": 10**6}),
        ("transformer/config.json", {"sample_size": 10**6}),
        ("text_encoder_2/config.json", {"num_layers": 513}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}),
        ("vae/config.json", {"layers_per_block": 10**6}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}),
    ],
)
def test_what_would_take_minutes_is_refused_first(packed_folder, file, setting):
    edit(packed_folder, file, **setting)
    ((name, value),) = setting.items()
    with pytest.raises(ArtifactError, match=rf"{file} says {name} = {value}, more than"):
        dirotq.load(packed_folder)


def test_numbers_up_to_the_tensors_are_let_through(packed_folder):
    edit(packed_folder, "scheduler/scheduler_config.json", num_train_timesteps=1000)
    edit(packed_folder, "text_encoder_2/config.json", num_decoder_layers=10)
    dirotq.load(packed_folder, device="cpu")


def test_a_libraries_error_names_the_component(packed_folder):
    index = packed_folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "missing.safetensors"}}))
    write_sums(packed_folder)
    with pytest.raises(ArtifactError, match=r"the component transformer of .* can't be loaded"):
        dirotq.load(packed_folder)


@pytest.mark.parametrize("folder", [None, 3, "~nobody-of-this-name/x"])
def test_a_folder_is_a_path(folder):
    with pytest.raises(ConfigError, match="no path of a folder"):
        dirotq.load(folder)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, 16])
def test_a_dtype_is_one_of_torchs_floats(packed_folder, dtype):
    with pytest.raises(ConfigError, match=r"use torch\.bfloat16"):
        dirotq.load(packed_folder, dtype=dtype)


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("no")])
def test_out_of_memory_stays_what_it_is(error):
    with pytest.raises(type(error)) as caught, explained("folder"):
        raise error
    assert any("while loading folder" in note for note in caught.value.__notes__)


class _Panic(BaseException):
    """As pyo3's, which tokenizers raises."""


@pytest.mark.parametrize(
    ("error", "ours", "message"),
    [
        (ImportError("needs sentencepiece"), UnsupportedError, "package .* needs sentencepiece"),
        (KeyError("x"), ArtifactError, "KeyError: 'x'"),
        (_Panic("index\nmore"), ArtifactError, r"_Panic: index\)"),
        (ArtifactError("ours"), ArtifactError, "^ours$"),
    ],
)
def test_libraries_errors_become_ours(error, ours, message):
    with pytest.raises(ours, match=re.compile(message)), explained("folder"):
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_leaving_is_no_error(error):
    with pytest.raises(error), explained("folder"):
        raise error
