import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirotq.errors import ConfigError
from dirotq.files.json_file import safe_name, weight_map


@pytest.mark.parametrize(
    "name", ["vae", "text_encoder_2", "model-00001-of-00002.safetensors", "modèle (1).safetensors"]
)
def test_plain_names(name):
    assert safe_name(name, "x") == name


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "C:x", ".hidden", "a\0b", "a\nb", " a",
     "a ", "*", "vae[1]", "x" * 256, "é" * 128, "\ud800", None, 3, ["a"]],
)  # fmt: skip
def test_everything_else_is_refused(name):
    with pytest.raises(ConfigError, match=r"^the index names .*no plain name"):
        safe_name(name, "the index")


@given(st.text())
def test_a_safe_name_stays_in_its_folder(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp()
    try:
        path = folder / safe_name(name, "x")
    except ConfigError:
        return
    assert path.resolve().parent == folder.resolve()
    assert path.name == name


def test_the_map_of_an_index(tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    assert weight_map(file) == {"a": "x.safetensors", "b": "x.safetensors"}


@pytest.mark.parametrize("shard", ["../../../x.safetensors", "/x.safetensors", 3, None, ["x"]])
def test_a_shard_elsewhere(tmp_path, shard):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"a": "y.safetensors", "b": shard}}))
    with pytest.raises(ConfigError, match=r"index\.json names .*no plain name"):
        weight_map(file)


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "x.pt", "x.safetensors.bin", "safetensors"])
def test_a_shard_that_is_a_pickle(tmp_path, shard):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ConfigError, match=r"can run code when loaded"):
        weight_map(file)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", '{"weight_map": []}', "{}", '{"weight_map": null}', "[" * 10**5]
)
def test_a_damaged_index(tmp_path, content):
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(content)
    with pytest.raises(
        ConfigError, match=r"index\.json is (damaged|no JSON object).*download the model"
    ):
        weight_map(file)
