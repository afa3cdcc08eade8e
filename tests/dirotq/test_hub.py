"""Ids and errors of the hub. What is fetched: tests/models/test_origin.py."""

import huggingface_hub
import pytest
from huggingface_hub import errors

import dirotq.hub
from dirotq.errors import ConfigError
from dirotq.hub import HubPath, hub_path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    dirotq.hub._commit.cache_clear()
    return tmp_path


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None, "main")),
        ("black-forest-labs/FLUX.1-dev@v1.0", ("black-forest-labs/FLUX.1-dev", None, "v1.0")),
        ("org/name/a/b.json@refs/pr/1", ("org/name", "a/b.json", "refs/pr/1")),
    ],
)
def test_a_place_on_the_hub(text, parts):
    assert hub_path(text, "model") == HubPath(*parts, "model")


@pytest.mark.parametrize("text", ["name", "./org/name", "../x/y", "/org/name", "~/x/y", "a b/c"])
def test_a_path_is_no_place_on_the_hub(text):
    assert hub_path(text, "model") is None


def test_a_commit_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert hub_path(f"org/name@{'a' * 40}", "model").commit == "a" * 40


def test_the_real_functions_without_a_network():
    """Offline, as all tests are: no retries, and the command that helps."""
    message = r"model org/name .* can't be reached.*`hf download org/name --revision v2`"
    with pytest.raises(ConfigError, match=message):
        hub_path("org/name@v2", "model").commit  # noqa: B018
    pinned = hub_path(f"org/name@{'a' * 40}", "model")
    with pytest.raises(ConfigError, match=r"does not hold all files matching x\.json"):
        pinned.fetch(["x.json"])
    data = hub_path(f"org/set/rows.json@{'a' * 40}", "dataset")
    with pytest.raises(ConfigError, match=r"`hf download --repo-type dataset org/set rows\.json"):
        data.download("rows.json")


def test_files_of_a_commit_that_are_here_need_no_hub(home):
    snapshot = home / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "x.json").touch()
    pinned = hub_path(f"org/name@{'a' * 40}", "model")
    assert pinned.fetch(["x.json"], lambda here: (here / "x.json").is_file()) == snapshot
    # The real one takes any folder of the commit for complete when it can't ask.
    with pytest.raises(ConfigError):
        hub_path(f"org/name@{'b' * 40}", "model").fetch(["y.json"], lambda here: True)


def test_a_missing_file_and_an_impossible_id(monkeypatch):
    httpx = pytest.importorskip("httpx2")
    answer = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co/x"))

    def missing(*_, **__):
        raise errors.RemoteEntryNotFoundError("404", response=answer)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    with pytest.raises(ConfigError, match=r"dataset org/set .*has no file 'x\.json'.*tree/aaaa"):
        hub_path(f"org/set@{'a' * 40}", "dataset").download("x.json")
    with pytest.raises(ConfigError, match="can't be the id of a repository"):
        hub_path("org/na..me", "model").commit  # noqa: B018
