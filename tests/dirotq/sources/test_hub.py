"""Ids and errors of the hub. What is fetched: tests/dirotq/sources/test_origin.py."""

import json

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import dirotq.sources.hub
from dirotq.errors import ConfigError
from dirotq.sources.hub import HubPath, hub_path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    dirotq.sources.hub._commit.cache_clear()
    dirotq.sources.hub._fetched.cache_clear()
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


@pytest.mark.parametrize(
    "text", ["name", "./org/name", "../x/y", "/org/name", "~/x/y", "a b/c", "a/b/../c"]
)
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


@pytest.fixture
def snapshot(home):
    folder = home / "models--org--name" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "x.json").touch()
    (folder.parents[1] / "trees").mkdir()
    return folder


def listed(snapshot, *names):
    files = {
        name: {"size": 0, "blob_id": "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"} for name in names
    }
    tree = snapshot.parents[1] / "trees" / f"{snapshot.name}.json"
    tree.write_text(json.dumps({"format_version": 1, "files": files}))


def test_a_commit_whose_files_are_here_needs_no_hub(snapshot, monkeypatch):
    """As the hub listed it. What matches no pattern may be missing."""
    listed(snapshot, "x.json", "y.txt")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    pinned = hub_path(f"org/name@{'a' * 40}", "model")
    assert pinned.fetch(["*.json", "z.json"]) == snapshot == pinned.snapshot
    with pytest.raises(TypeError):  # would ask
        pinned.fetch(["*.json", "*.txt"])
    (snapshot / "x.json").unlink()
    (snapshot / "x.json").symlink_to("a blob that was removed")
    with pytest.raises(TypeError):
        pinned.fetch(["*.json"])


def test_a_download_that_was_killed_is_asked_for_again(snapshot, monkeypatch):
    """Without a list nothing tells a part from the whole; once per process is enough."""
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **more: asked.append(more) or snapshot
    )
    pinned = hub_path(f"org/name@{'a' * 40}", "model")
    assert pinned.fetch(["x.json"]) == pinned.fetch(["x.json"]) == snapshot
    assert len(asked) == 1
    pinned.fetch(["y.json"])
    assert len(asked) == 2


def test_without_a_network_and_a_list_the_folder_is_taken_as_it_is(snapshot, home, monkeypatch):
    """By the real function; the caller finds what is missing. With a list it is known here."""
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **more: real(*a, cache_dir=home, **more)
    )
    pinned = hub_path(f"org/name@{'a' * 40}", "model")
    assert pinned.fetch(["y.json"]) == snapshot
    dirotq.sources.hub._fetched.cache_clear()
    listed(snapshot, "y.json")
    with pytest.raises(ConfigError, match=r"does not hold all files matching y\.json"):
        pinned.fetch(["y.json"])
    with pytest.raises(ConfigError):
        hub_path(f"org/name@{'b' * 40}", "model").fetch(["y.json"])


@pytest.mark.parametrize(
    "unreachable", [errors.OfflineModeIsEnabled("offline"), errors.HTTPError("no route to host")]
)
def test_so_it_is_by_a_library_that_wants_the_list_first(snapshot, monkeypatch, unreachable):
    """As huggingface_hub 1.28 to 1.33 does of a commit. What the hub answers counts."""

    def refused(*_, **__):
        raise unreachable

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    pinned = hub_path(f"org/name@{'a' * 40}", "model")
    assert pinned.fetch(["y.json"]) == snapshot
    with pytest.raises(ConfigError, match="can't be reached"):
        hub_path(f"org/name@{'b' * 40}", "model").fetch(["y.json"])
    dirotq.sources.hub._fetched.cache_clear()
    listed(snapshot, "y.json")  # which tells that the folder is not whole
    with pytest.raises(ConfigError, match=r"does not hold all files matching y\.json"):
        pinned.fetch(["y.json"])


def test_what_the_hub_answers_is_no_lack_of_a_network(snapshot, monkeypatch):
    httpx = pytest.importorskip("httpx2")
    answer = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x"))

    def refused(*_, **__):
        raise errors.HfHubHTTPError("forbidden", response=answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refused)
    with pytest.raises(ConfigError, match="refused all files matching"):
        hub_path(f"org/name@{'a' * 40}", "model").fetch(["y.json"])


def test_a_damaged_note_of_the_commit_is_not_believed(home, monkeypatch):
    """An empty file, as power loss leaves it, would name the folder of all snapshots."""
    refs = home / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("")
    with pytest.raises(ConfigError, match="can't be reached"):
        hub_path("org/name", "model").commit  # noqa: B018
    (refs / "main").write_text("a" * 40 + "\n")
    assert hub_path("org/name", "model").commit == "a" * 40


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
