import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from safetensors import SafetensorError
from tiny_line import tree_bytes
from tiny_sources import *  # noqa: F403
from tiny_sources import model, tensors_of

import dirotq.files.digest
import dirotq.sources.variant
from dirotq.errors import ConfigError
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.stage import recipe
from dirotq.sources.variant import DIGESTS


def test_the_folder_is_a_pipeline_made_once(folder, lora, cache, monkeypatch):
    changed = model(folder, lora=str(lora()))
    made = changed.folder()
    assert made.parent == cache / "sources"
    monkeypatch.setattr(dirotq.sources.variant, "_write_transformer", None)
    assert changed.folder() == made
    assert {p.name for p in made.iterdir()} == {p.name for p in folder.iterdir()} | {DIGESTS}
    pipe = changed.pipeline(torch.float32, torch.device("cpu"))
    assert type(pipe).__name__ == "FluxPipeline"
    assert changed.call_arguments() == model(folder).call_arguments()
    assert [p.name for p in made.parent.iterdir() if p.name.startswith(".")] == []


def test_a_plan_writes_nothing(folder, lora, cache):
    changed = model(folder, lora=str(lora()))
    recipe(changed)
    assert changed.sites() == model(folder).sites()
    assert not (cache / "sources").exists()


def test_what_it_takes_in_the_cache_is_known_beforehand(folder, lora, cache):
    def work(*more):
        cfg = compose_config([f"model={folder}", *more], "dirotq.conf")
        return instantiate(cfg.workload, _convert_="all")

    changed = f"model.lora={lora()}"
    expected = work(changed).cache_bytes
    made = work(changed).model.folder()
    assert expected == pytest.approx(
        sum(f.stat().st_size for f in made.rglob("*.safetensors")), rel=0.1
    )
    assert work(changed).cache_bytes == work().cache_bytes == 0


def test_others_may_read_it_if_the_umask_says_so(folder, lora):
    before = os.umask(0o022)
    try:
        made = model(folder, lora=str(lora())).folder()
    finally:
        os.umask(before)
    for path in (made, *made.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path


def test_using_it_shows_in_its_time(folder, lora):
    """For `dirotq gc --cache`."""
    changed = model(folder, lora=str(lora()))
    os.utime(changed.folder(), (0, 0))
    assert changed.folder().stat().st_mtime > 0


def test_a_failed_write_leaves_nothing_behind(folder, lora, cache, monkeypatch):
    def fails(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(dirotq.sources.variant, "place_rest", fails)
        with pytest.raises(OSError, match="no space"):
            model(folder, lora=str(lora())).folder()
    assert [p for p in (cache / "sources").iterdir() if p.is_dir()] == []
    assert model(folder, lora=str(lora())).folder().is_dir()


def test_a_lost_link_is_mended(folder, lora):
    changed = model(folder, lora=str(lora()))
    made = changed.folder()
    (made / "vae" / "gone").symlink_to(made / "nowhere")
    assert changed.folder() == made
    assert not (made / "vae" / "gone").is_symlink()


def flip(file, at=-1):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    stat = file.stat()
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    "name",
    ["transformer/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors",
     "vae/config.json", DIGESTS],
)  # fmt: skip
@pytest.mark.parametrize("what", ["flipped", "truncated", "missing", "emptied"])
def test_a_damaged_variant_is_written_again(variant, name, what, caplog):
    changed, made = variant
    before = tree_bytes(made)
    file = made / name
    if what == "flipped":
        flip(file, 0)  # silent until it was held against its digest: no length changed
    elif what == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] if what == "truncated" else b"")
    assert changed.folder() == made
    assert tree_bytes(made) == before
    assert "is not as it was written" in caplog.text


def test_a_file_that_was_added_is_no_part_of_it(variant):
    changed, made = variant
    (made / "text_encoder" / "adapter_config.json").write_text("{}")
    changed.folder()
    assert not (made / "text_encoder" / "adapter_config.json").exists()


@pytest.fixture
def variant(own_folder, lora):
    changed = model(own_folder, lora=str(lora()))
    return changed, changed.folder()


def test_an_intact_variant_is_hashed_once(variant, monkeypatch):
    changed, made = variant
    changed.folder()
    monkeypatch.setattr(dirotq.files.digest, "TICK", 0)
    changed.folder()
    monkeypatch.setattr(dirotq.files.digest, "_hash", None)
    assert changed.folder() == made


def test_nothing_of_it_is_the_users_to_write_to(variant, own_folder):
    """Neither hard links nor links to what the variant was made of."""
    _, made = variant
    theirs = {p.stat().st_ino for p in own_folder.rglob("*")}
    for path in made.rglob("*"):
        assert not path.is_symlink()
        assert path.stat().st_ino not in theirs, path


def test_a_variant_of_another_base_after_an_edit(variant, own_folder):
    changed, made = variant
    flip(own_folder / "vae" / "diffusion_pytorch_model.safetensors")
    assert changed.folder() != made
    assert made.is_dir()


def test_files_that_change_while_they_are_read(own_folder, lora, cache, monkeypatch):
    """The folder would bear the name of what was there before."""
    rest = dirotq.sources.variant.place_rest

    def slow(base, draft):
        flip(own_folder / "transformer" / "diffusion_pytorch_model.safetensors")
        rest(base, draft)

    changed = model(own_folder, lora=str(lora()))
    with monkeypatch.context() as patch:
        patch.setattr(dirotq.sources.variant, "place_rest", slow)
        with pytest.raises(ConfigError, match="changed while it was read"):
            changed.folder()
    assert [p for p in (cache / "sources").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_modes_follow_the_umask(own_folder, lora, cache, umask, mode):
    """safetensors writes 0600, tempfile 0700: another user of the cache could not read them."""
    before = os.umask(umask)
    try:
        made = model(own_folder, lora=str(lora())).folder()
    finally:
        os.umask(before)
    modes = {p.stat().st_mode & 0o777 for p in made.rglob("*") if p.is_file()}
    assert modes == {mode}
    folders = {p.stat().st_mode & 0o777 for p in [made, *made.rglob("*")] if p.is_dir()}
    assert folders == {0o777 & ~umask}


def test_it_is_on_the_disk_before_it_has_its_name(own_folder, lora, monkeypatch):
    calls = []
    monkeypatch.setattr(dirotq.sources.variant, "sync_tree", lambda p: calls.append(p.name[0]))
    monkeypatch.setattr(dirotq.sources.variant, "sync", lambda p: calls.append(p.name))
    model(own_folder, lora=str(lora())).folder()
    assert calls == [".", "sources"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda place: OSError(errno.ENOSPC, "No space left on device"), "the disk is full.*room"),
        (
            lambda place: SafetensorError("Io: No space left on device (os error 28)"),
            "disk is full",
        ),
        (lambda place: OSError(errno.EROFS, "Read-only file system", str(place)), "Read-only"),
        (lambda place: PermissionError(errno.EACCES, "Permission denied", str(place)), "denied"),
    ],
)
def test_a_cache_that_can_not_be_written(own_folder, lora, cache, monkeypatch, error, message):
    def fails(target, *_):
        raise error(target)

    monkeypatch.setattr(dirotq.sources.variant, "_write_transformer", fails)
    with pytest.raises(ConfigError, match=rf"{message}.*DIROTQ_CACHE"):
        model(own_folder, lora=str(lora())).folder()
    assert [p for p in (cache / "sources").iterdir() if p.is_dir()] == []


def test_an_error_elsewhere_is_not_the_caches(own_folder, lora, monkeypatch):
    def fails(*_):
        raise OSError(errno.EIO, "Input/output error", "/mnt/model")

    monkeypatch.setattr(dirotq.sources.variant, "_write_transformer", fails)
    with pytest.raises(OSError, match="Input/output"):
        model(own_folder, lora=str(lora())).folder()


def test_a_cache_below_a_file(own_folder, lora, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match=r"has to be written to .*DIROTQ_CACHE"):
        model(own_folder, lora=str(lora())).folder()


def test_what_is_there_already_needs_no_permission_to_write(variant, monkeypatch):
    changed, made = variant

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "write_text", "replace"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(dirotq.sources.variant, "FileLock", refuse)
    monkeypatch.setattr(dirotq.files.digest, "FileLock", refuse)
    assert changed.folder() == made


def test_shards_are_small_and_in_order(folder, lora, monkeypatch):
    monkeypatch.setattr(dirotq.sources.variant, "SHARD", 50_000)
    made = model(folder, lora=str(lora())).folder()
    files = sorted((made / "transformer").glob("*.safetensors"))
    index = made / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert len(files) == len(set(json.loads(index.read_text())["weight_map"].values())) > 3
    assert tensors_of(made).keys() == tensors_of(folder).keys()
    assert model(folder, lora=str(lora())).weights().files.keys() == tensors_of(folder).keys()


def test_identity_of_a_variant(folder, lora, tmp_path):
    one = model(folder, lora=str(lora()))
    moved = shutil.copy(lora(), tmp_path / "moved.safetensors")
    assert recipe(one) == recipe(model(folder, lora=[{"path": str(moved), "weight": 1}]))
    assert recipe(one) != recipe(model(folder))
    assert recipe(one) != recipe(model(folder, lora=[{"path": str(moved), "weight": 0.5}]))
    assert recipe(model(folder, lora=[])) == recipe(model(folder))
