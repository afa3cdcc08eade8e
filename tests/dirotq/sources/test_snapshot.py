"""Snapshots of the hub that are incomplete, damaged or edited. Whole ones: test_origin."""

import shutil

import fake_hub
import pytest
from fake_hub import *  # noqa: F403
from fake_hub import COMMIT, HOME, fresh_process, pulled_plug, snapshot
from tiny_line import tree_bytes
from tiny_sources import *  # noqa: F403
from tiny_sources import model

from dirotq.errors import ConfigError
from dirotq.pipeline.stage import recipe
from dirotq.sources.variant import DIGESTS

WEIGHTS = "text_encoder_2/model.safetensors"
IDENTITY = {"repo": "org/tiny", "commit": COMMIT}


@pytest.fixture
def here(hub, tmp_path):
    """The snapshot, downloaded."""
    model("org/tiny").folder()
    hub.clear()
    return snapshot(tmp_path)


@pytest.fixture
def unlisted(here, monkeypatch):
    """Older versions of huggingface_hub keep no list of a commit's files."""
    monkeypatch.setattr(fake_hub, "write_list", lambda *_: None)
    shutil.rmtree(here.parents[1] / "trees")
    fresh_process()


def killed(here, *names, listed=True):
    """As a killed download leaves it: links come last."""
    for name in names:
        blob = (here / name).resolve()
        (here / name).unlink()
        blob.rename(blob.with_name(f"{blob.name}.incomplete"))
    if not listed:
        shutil.rmtree(here.parents[1] / "trees")
    fresh_process()


def unlinked(here):
    """As a cache is that was copied without its links, or made on Windows."""
    for path in [p for p in here.rglob("*") if p.is_symlink()]:
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    shutil.rmtree(here.parents[1] / "blobs")


@pytest.mark.parametrize("listed", [True, False])
def test_settings_that_a_killed_download_left_out_are_fetched(here, hub, listed):
    """Each folder still held another .json, which was enough; every prompt was the same token."""
    names = ["text_encoder/config.json", "tokenizer/tokenizer.json"]
    killed(here, *names, listed=listed)
    before = model("org/tiny").identity()
    assert sorted(hub) == names
    assert before == IDENTITY | {"call": model("org/tiny").call_arguments()}
    assert (here / names[1]).is_file()


@pytest.mark.parametrize("listed", [True, False])
def test_weights_that_a_killed_download_left_out_are_fetched(here, hub, listed):
    killed(here, WEIGHTS, listed=listed)
    model("org/tiny").identity()
    assert hub == []
    model("org/tiny").folder()
    assert hub == [WEIGHTS]


def test_a_killed_download_without_a_network_is_named(here, monkeypatch):
    killed(here, "tokenizer/tokenizer.json")
    pulled_plug(monkeypatch)
    with pytest.raises(ConfigError, match=r"does not hold .*tokenizer.*`hf download org/tiny`"):
        model("org/tiny").identity()


def test_an_intact_snapshot_is_its_commit(here):
    assert model("org/tiny").identity().items() >= IDENTITY.items()
    assert "files" not in model("org/tiny").identity()


@pytest.mark.parametrize("name", [WEIGHTS, "vae/config.json", "model_index.json"])
@pytest.mark.parametrize("listed", [True, False])
def test_one_flipped_bit_of_a_blob_is_named_and_mended(here, hub, name, listed):
    """Identity sees it too, so a stage that was running is not published."""
    if not listed:
        shutil.rmtree(here.parents[1] / "trees")
    blob = (here / name).resolve()
    content = bytearray(blob.read_bytes())
    good = bytes(content)
    content[0 if name == WEIGHTS else -1] ^= 1 if name == WEIGHTS else 42  # "\n" to a space
    blob.write_bytes(content)
    for look in (model("org/tiny").identity, model("org/tiny").folder):
        with pytest.raises(ConfigError, match=rf"{name} is damaged, or was edited.*{blob}"):
            look()
    blob.unlink()  # what the message says
    fresh_process()
    model("org/tiny").folder()
    assert (here / name).read_bytes() == good


def edit(here):
    """`sed -i` replaces the link by a file."""
    file = here / "scheduler" / "scheduler_config.json"
    content = file.read_text()
    file.unlink()
    file.write_text(content.replace("1.0", "2.0", 1))


def test_an_edited_settings_file_is_refused(here):
    edit(here)
    with pytest.raises(ConfigError, match="or was edited"):
        model("org/tiny").identity()


def test_an_edited_settings_file_counts_where_no_list_tells(here, unlisted):
    edit(here)
    edited = model("org/tiny").identity()
    assert list(edited["files"]) == ["scheduler/scheduler_config.json"]
    assert edited.items() >= IDENTITY.items()


def test_a_cache_without_links_is_held_against_the_list(here):
    unlinked(here)
    assert "files" not in model("org/tiny").identity()
    file = here / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(ConfigError, match=rf"{WEIGHTS} is damaged"):
        model("org/tiny").folder()


def test_a_cache_without_links_and_list_counts_byte_by_byte(here, folder, unlisted):
    """Nothing proves that it is the commit; an edit gives another fingerprint."""
    unlinked(here)
    tiny = model("org/tiny")
    local = model(folder).identity()["files"]
    assert tiny.identity()["files"] == local
    before = recipe(tiny)
    file = here / WEIGHTS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert recipe(tiny) != before


def test_without_links_and_list_a_plan_knows_all_files(here, hub, unlisted):
    """Or the download of the weights would change the fingerprint."""
    unlinked(here)
    (here / WEIGHTS).unlink()
    before = model("org/tiny").identity()
    assert hub == [WEIGHTS]
    model("org/tiny").folder()
    assert model("org/tiny").identity() == before


def test_a_snapshot_by_its_path_is_a_local_folder(here, folder):
    assert model(here).identity() == model(folder).identity()


def test_a_variant_shares_blobs_and_nothing_else(here, lora, tmp_path):
    changed = model("org/tiny", lora=str(lora()))
    made = changed.folder()
    assert (made / WEIGHTS).stat().st_ino == (here / WEIGHTS).stat().st_ino
    assert not [p for p in made.rglob("*") if p.is_symlink()]
    assert tree_bytes(made).keys() - {DIGESTS} <= tree_bytes(tmp_path / "remote").keys()
    blob = (here / WEIGHTS).resolve()
    assert blob.parent == tmp_path / "hub" / HOME / "blobs"
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged"):
        changed.folder()
