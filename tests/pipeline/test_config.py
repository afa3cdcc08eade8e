import re

import pytest

from dirotq.errors import ConfigError
from dirotq.pipeline.config import compose_config, with_model_folder

TOY = "toyline.conf"


@pytest.mark.parametrize("name", ["plain", "with space", "quo'te", "a=b,c"])
def test_a_folder_is_a_model(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    cfg = compose_config([f"model={folder}"], TOY)
    assert cfg.model.path == str(folder)
    assert cfg.model.offset == 7  # conf/model/local.yaml


def test_the_last_model_counts(tmp_path):
    assert with_model_folder([f"model={tmp_path}", "until=x", "model=small"], TOY) == [
        "until=x",
        "model=small",
    ]


def test_a_page_of_the_hub_is_no_id():
    page = "https://huggingface.co/org/name/tree/main"
    with pytest.raises(ConfigError, match=r"is an address; give the hub id, model=org/name$"):
        with_model_folder([f"model={page}"], TOY)


def test_relative_folder_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert with_model_folder(["model=mine"], TOY)[1] == f"model.path='{tmp_path / 'mine'}'"


@pytest.mark.parametrize("value", ["org/name", "org/na-me.1@v1.0", "org/name@refs/pr/3"])
def test_a_hub_id_is_a_model(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert compose_config([f"model={value}"], TOY).model.path == value
    assert compose_config([f"model={value}"], TOY).model.offset == 7
    (tmp_path / value).mkdir(parents=True)
    assert compose_config([f"model={value}"], TOY).model.path == str(tmp_path / value)


def test_a_file_is_a_model(tmp_path, monkeypatch):
    file = tmp_path / "my finetune.safetensors"
    assert compose_config([f"model={file}"], TOY).model.path == str(file)  # missing: said later
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "old.ckpt").touch()  # refused where models are read, with the reason
    assert compose_config(["model=~/old.ckpt"], TOY).model.path == str(tmp_path / "old.ckpt")


def test_a_config_name_wins_over_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "large").mkdir()
    assert with_model_folder(["model=large"], TOY) == ["model=large"]


def test_other_overrides_and_sweeps_stay():
    overrides = ["model=small,large", "model.offset=3", "+x=1", "-m", "~squares"]
    assert with_model_folder(overrides, TOY) == overrides


@pytest.mark.parametrize("value", ["larg", "./org/name", "a/b/c", "/absent/folder", "org/name@"])
def test_unknown_model(value):
    with pytest.raises(ConfigError, match=r"no such model.*large, local, small.*diffusers folder"):
        compose_config([f"model={value}"], TOY)


def test_another_folders_groups(dirotq, tmp_path):
    (tmp_path / "é (1)" / "squares").mkdir(parents=True)
    mine = "_target_: toyline.stages.Squares\npower: 3\nfail: false\n"
    (tmp_path / "é (1)" / "squares" / "mine.yaml").write_text(mine)
    result = dirotq("compress", "-v", "--config-dir", str(tmp_path / "é (1)"), "squares=mine")
    assert (result.status, "largest=27" in result.out) == (0, True), result


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("+squares.powr=3", "squares.powr: there is no such setting; did you mean `squares.power`"),
        ("++squares.powr=3", "did you mean `squares.power`"),
        ("+squars.power=3", "squars: there is no such setting; did you mean `squares`"),
        ("+stor=x", "did you mean `store`"),
        ("+store.x=1", "store.x: there is no such setting; store is a value without parts"),
        ("+hydra.run.dirr=x", "did you mean `hydra.run.dir`"),
        ("+squares=default", "squares is chosen already; write squares=... without the +"),
        ("+hydra.rn.dir=x", "did you mean `hydra.run`"),
    ],
)
def test_an_unknown_setting_with_a_plus(word, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        compose_config([word], TOY)


def test_a_mapping_without_a_class_takes_no_new_names():
    with pytest.raises(ConfigError, match=re.escape("did you mean `prompts.calibration`")):
        compose_config(["+prompts.calibratio.count=1"], "dirotq.conf")


@pytest.mark.parametrize(
    "words",
    [
        ["+model.call.num_inference_steps=3"],
        ["+model.call.height=32", "model.call.height=64"],  # the second is about the first
        ["+hydra.job.env_set.NAME=x"],
    ],
)
def test_what_may_be_appended(words):
    assert compose_config(words, "dirotq.conf")
