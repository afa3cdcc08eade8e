from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dirotq.errors import ConfigError
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.quoting import parsed, quote, quoted

TOY = "toyline.conf"
SPECIAL = st.text(alphabet="abé\\'\"${}[]()=,~ #:\n", max_size=12)
PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@given(st.one_of(SPECIAL, PLAIN))
def test_quoted_text_comes_back_whole_whatever_is_in_it(text):
    value = parsed(f"x={quote(text)}").value()
    tree = OmegaConf.create({"x": value, "below": "${x}/runs"})
    assert (tree.x, tree.below) == (text, f"{text}/runs")


PATHS = [
    "é", "a (1)", "a [b]", "[b]", "it's", 'say "x"', "a=b", "a,b", "a b", " a", "a ", "a#b", "a&b",
    "$x", "{a: b}", "a\\b", "a\\", "a\nb", "123", "1e3", "true", "x:y", "a@b", "%20", "!x", "a;b",
    "🙂", "~x~",
]  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_a_path(tmp_path, name):
    folder = tmp_path / name
    line = build(compose_config([f"store={folder}", f"model.path={folder}"], TOY))
    assert line.store.root == folder  # nothing is there yet
    assert line.steps[0].stage.model.path == str(folder)
    assert not folder.exists()


@pytest.mark.parametrize("name", ["a${b}", "${oc.env:HOME}", "a${b", "\\${b}", "${now:%Y}"])
def test_an_existing_path_is_no_interpolation(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    line = build(compose_config([f"store={folder}", f"model.path={folder}"], TOY))
    assert line.store.root == folder
    assert line.steps[0].stage.model.path == str(folder)


def test_the_command_line_writes_where_it_was_told(dirotq, tmp_path):
    store = tmp_path / "é (1) [x], it's = #1"
    assert dirotq("compress", f"store={store}").status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [store.name]
    (record,) = (store / "runs").glob("*/.hydra/config.yaml")
    assert OmegaConf.load(record).store == str(store)
    assert "everything is cached" in dirotq("plan", f"store={store}").out
    assert dirotq("verify", f"store={store}").out.endswith("3 of 3 artifacts are intact\n")


def test_a_tilde_is_the_home_folder_as_a_shell_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compose_config(["store=~/é x"], TOY).store == str(tmp_path / "é x")
    assert compose_config(["store=~"], TOY).store == str(tmp_path)
    assert compose_config(["store=~nosuchuser/x"], TOY).store == "~nosuchuser/x"


def test_interpolations_of_settings_and_of_the_environment_stay(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert compose_config(["store=${oc.env:SCRATCH}/mine"], TOY).store == "/scratch/mine"
    with pytest.raises(ConfigError, match="store: Interpolation key 'nix' not found"):
        build(compose_config(["store=${nix}/x"], TOY))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("rank.r=8,16", "rank.r=8,16"),
        ("metrics=[lpips,fid]", "metrics=[lpips,fid]"),
        ("x=[{sites: a.*.b, act_bits: 8}]", "x=[{sites: a.*.b, act_bits: 8}]"),
        ("model.lora=null", "model.lora=null"),
        ("model.lora=[a.st,b.st]", "model.lora=[a.st,b.st]"),
        ("model.lora=[é.st,{path: b (1).st, weight: 0.8}]",
         "model.lora=['é.st',{path: 'b (1).st', weight: 0.8}]"),
        ("store='a b'", "store='a b'"),
        ("column=text (en)", "column='text (en)'"),
        ("squares.power=[1", "squares.power=[1"),  # refused with its own message
        ("hydra.run.dir=${store}/x", "hydra.run.dir=${store}/x"),
        ("~squares", "~squares"),
        ("--cfg=job", "--cfg=job"),
    ],
)  # fmt: skip
def test_what_is_no_path_stays_what_it_is(given, kept):
    assert quoted(given) == kept


def test_a_sweep_over_paths():
    assert quoted("store=a,b", sweep=True) == "store='a','b'"
    assert quoted("model.lora=a (1).st,null", sweep=True) == "model.lora='a (1).st',null"
    assert quoted("store=choice(a,b)", sweep=True) == "store=choice(a,b)"
    assert quoted("store=a,b") == "store='a,b'"


@pytest.mark.parametrize("value", ["a\0b", "\udce9"])
def test_what_no_path_can_hold_is_refused(value):
    with pytest.raises(ConfigError, match=r"NUL character|no valid UTF-8"):
        quoted(f"store={value}")


def test_the_store_of_a_run_is_below_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build(compose_config(["store=a/../b"], TOY))
    assert list(Path(tmp_path).iterdir()) == []
