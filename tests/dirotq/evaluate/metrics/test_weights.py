import pytest
from hydra.utils import instantiate

from dirotq.errors import ConfigError
from dirotq.evaluate.metrics.weights import (
    digests,
    imported,
    local_file,
    local_folder,
    refuse_missing,
)
from dirotq.pipeline.config import compose_config

CHOICES = ["lpips", "fid", "fid_ground_truth", "clip_score", "image_reward"]


def test_what_is_missing_is_named_with_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"lpips: .*/x does not exist\. It should be a thing"):
        local_file("lpips", str(tmp_path / "x"), "a thing")
    with pytest.raises(ConfigError, match=r"is no folder. It should be a thing"):
        local_folder("clip", str(tmp_path / "x"), "a thing")
    with pytest.raises(ConfigError, match=r"needs the package surely_absent.*pip install it"):
        refuse_missing("lpips", "surely_absent", "it")


def test_a_package_that_breaks_on_import_is_a_config_error(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('operator does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"can't be imported here .operator does not exist."):
        imported("lpips", "broken_package", "it")


def test_digests_are_of_the_content(tmp_path):
    for name in ("b", "a"):
        (tmp_path / name).write_text("same")
    found = digests(tmp_path, tmp_path.iterdir())
    assert list(found) == ["a", "b"]
    assert found["a"] == found["b"]


@pytest.fixture(scope="module")
def learned():
    cfg = compose_config([f"metrics=[{','.join(CHOICES)}]"], "dirotq.conf")
    return instantiate(cfg.validate, _convert_="all").learned


def test_every_snippet_builds_and_none_replaces_another(learned):
    assert set(learned) == {
        "lpips", "inception_fid", "inception_fid_ground_truth", "clip_score", "image_reward",
    }  # fmt: skip
    paired = {name for name, metric in learned.items() if metric.paired}
    assert paired == {"lpips", "inception_fid"}


def test_every_one_says_what_it_lacks(learned):
    for name, metric in learned.items():
        with pytest.raises(ConfigError, match=r"does not exist|is no folder|needs the package"):
            metric.check()
        with pytest.raises(ConfigError, match=r"weights/.*(does not exist|is no folder)"):
            metric.identity()
        assert name.startswith(type(metric).__module__.rpartition(".")[2])


def test_their_folder_is_one_setting():
    cfg = compose_config(["metrics=clip_score", "weights=/data"], "dirotq.conf")
    assert cfg.validate.learned.clip_score.path == "/data/clip"
