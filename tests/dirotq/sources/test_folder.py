"""Which files of a pipeline are read, copied, refused: links of every kind."""

import fcntl
import json
import os
import shutil

import pytest
from tiny_pipelines import family_folder

from dirotq.errors import ConfigError
from dirotq.sources.doors import refuse_doors
from dirotq.sources.folder import (
    carried_files,
    component_files,
    missing_weights,
    pipeline_files,
    place,
)
from dirotq.sources.origin import pipeline_folder, pipeline_identity

SECRET = "BEGIN PRIVATE KEY"


@pytest.fixture
def root(own_folder):
    return own_folder


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "home" / "id.txt"
    file.parent.mkdir()
    file.write_text(SECRET)
    return file


def index(root):
    return json.loads((root / "model_index.json").read_text())


def names(root, files):
    return {path.relative_to(root).as_posix() for path in files}


def move_out(root, part, tmp_path):
    """The folder of ``part`` becomes a link to another place."""
    place = tmp_path / f"other {part}"
    shutil.move(root / part, place)
    (root / part).symlink_to(place)
    return place


def identity(root):
    return pipeline_identity(str(root))["files"]


def test_without_links_all_files_count_as_ever(folder, root):
    for name in ("notes.txt", ".cache/x", "old/vae/y.bin", "vae/.hidden"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    for name in ("samples.png", "README.md", "vae/training.json"):
        (root / name).write_text("not counted")
    counted = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    counted -= {"samples.png", "README.md", "vae/training.json"}
    assert identity(root).keys() == counted
    assert identity(folder).items() < identity(root).items()


def test_a_component_that_is_a_link_counts_file_by_file(folder, root, tmp_path):
    """The same fingerprint as without the link; another one once other bytes lie behind it."""
    place = move_out(root, "transformer", tmp_path)
    assert identity(root) == identity(folder)
    other = shutil.copytree(place, tmp_path / "finetune")
    weights = other / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (root / "transformer").unlink()
    (root / "transformer").symlink_to(other)
    changed = identity(root)
    assert {n for n in changed if changed[n] != identity(folder)[n]} == {
        "transformer/diffusion_pytorch_model.safetensors"
    }


@pytest.mark.parametrize("linked", [False, True])
def test_identity_sees_the_disk_when_it_is_asked_again(root, tmp_path, linked):
    """`cp -p` of a finetune over the weights, while a run is on its way."""
    place = move_out(root, "transformer", tmp_path) if linked else root / "transformer"
    before = identity(root)
    assert identity(root) == before
    weights = place / "diffusion_pytorch_model.safetensors"
    stat, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = identity(root)
    assert {n for n in changed if changed[n] != before[n]} == {
        "transformer/diffusion_pytorch_model.safetensors"
    }


def test_a_whole_folder_that_is_a_link(folder, root, tmp_path):
    (tmp_path / "hop").symlink_to(root)
    (tmp_path / "model").symlink_to("hop")
    assert identity(tmp_path / "model") == identity(folder)


@pytest.mark.parametrize(
    "name", ["vae/notes.txt", "tokenizer/vocab.txt", "transformer/sub/x.json", "LICENSE.md"]
)
def test_a_link_to_a_private_file_is_refused(root, secret, name):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to(secret)
    with pytest.raises(ConfigError, match=rf"{name} is a link out of .*{secret}.*cp -L"):
        pipeline_folder(str(root), weights=False)


def test_every_way_out_is_refused(root, secret, tmp_path):
    tries = {
        "vae/folder": secret.parent,  # a linked folder
        "vae/relative.txt": "../../home/id.txt",
        "vae/chain.txt": root / "hop",  # over a link at the top, which nobody reads
    }
    (root / "hop").symlink_to(secret)
    for name, target in tries.items():
        (root / name).symlink_to(target)
        with pytest.raises(ConfigError, match=r"vae/.* is a link out of"):
            pipeline_folder(str(root), weights=False)
        (root / name).unlink()
    place = move_out(root, "vae", tmp_path)  # within a linked component
    (place / "inner.txt").symlink_to(secret)
    with pytest.raises(ConfigError, match=r"vae/inner\.txt is a link out of"):
        pipeline_folder(str(root), weights=False)


def test_links_that_stay_are_followed(folder, root, tmp_path):
    """Between components; within a linked component."""
    (root / "tokenizer" / "tokenizer.json").rename(root / "shared.json")
    (root / "tokenizer" / "tokenizer.json").symlink_to("../shared.json")
    place = move_out(root, "vae", tmp_path)
    (place / "config.json").rename(place / "real.json")
    (place / "config.json").symlink_to("real.json")
    found = identity(root)
    assert all(found[name] == digest for name, digest in identity(folder).items())
    pipeline_folder(str(root), weights=True)


def repository(tmp_path, name):
    blobs = tmp_path / f"models--org--{name}" / "blobs"
    blobs.mkdir(parents=True)
    snapshot = blobs.parent / "snapshots" / ("a" * 40)
    return blobs, snapshot


def test_a_snapshot_leads_to_blobs_of_its_own_repository(folder, root, tmp_path):
    blobs, snapshot = repository(tmp_path, "one")
    shutil.copytree(root, snapshot)
    weights = snapshot / "vae" / "diffusion_pytorch_model.safetensors"
    digest = identity(folder)["vae/diffusion_pytorch_model.safetensors"]
    weights.rename(blobs / digest)
    weights.symlink_to(f"../../../blobs/{digest}")
    assert identity(snapshot) == identity(folder)
    # One component of it in a folder of one's own.
    shutil.rmtree(root / "vae")
    (root / "vae").symlink_to(snapshot / "vae")
    assert identity(root) == identity(folder)
    # A blob of another repository is any other file.
    others, _ = repository(tmp_path, "private")
    (others / digest).write_bytes((blobs / digest).read_bytes())
    weights.unlink()
    weights.symlink_to(others / digest)
    with pytest.raises(ConfigError, match="is a link out of"):
        pipeline_folder(str(snapshot), weights=False)


def test_what_nobody_reads_may_lead_anywhere(folder, root, secret):
    (root / "outputs").symlink_to(secret.parent)
    (root / "old").mkdir()
    (root / "old" / "x").symlink_to(secret)
    assert identity(root).keys() - identity(folder).keys() == {"old/x"}  # as ever
    assert names(root, carried_files(root, index(root))) == names(
        folder, carried_files(folder, index(folder))
    )


@pytest.mark.parametrize("kind", ["loop", "broken"])
def test_links_without_an_end(root, kind):
    (root / "vae" / "x").symlink_to(root if kind == "loop" else root / "nowhere")
    with pytest.raises(ConfigError, match=r"vae/x is a link (back to|that leads nowhere)"):
        pipeline_folder(str(root), weights=False)


FOREIGN = (
    "notes.txt", "samples.png", "flux.safetensors", "pipeline.py", ".git/config", "old/x.json",
    "vae/model.onnx", "vae/modeling.py", "vae/x.bin", "vae/.hidden.json", "vae/sub/x.json",
    "vae/diffusion_pytorch_model.fp16.safetensors", "vae/training.json",
    "vae/diffusion_pytorch_model.fp16.safetensors.index.json",
    "text_encoder/pytorch_model.bin.index.json",
)  # fmt: skip


def test_only_what_components_need_is_carried(folder, root):
    for name in FOREIGN:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    for name in ("LICENSE", "NOTICE.txt", "LICENSE-flux.md", "tokenizer/chat_template.jinja",
                 "tokenizer/additional_chat_templates/tools.jinja"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("carried")
    ours, theirs = (names(f, carried_files(f, index(f))) for f in (root, folder))
    assert ours - theirs == {
        "LICENSE", "NOTICE.txt", "LICENSE-flux.md", "tokenizer/chat_template.jinja",
        "tokenizer/additional_chat_templates/tools.jinja",
    }  # fmt: skip
    assert theirs == names(folder, (p for p in folder.rglob("*") if p.is_file()))
    without = names(root, carried_files(root, index(root), without="transformer"))
    assert without == {name for name in ours if not name.startswith("transformer/")}


def test_what_is_carried_is_in_the_fingerprint(folder, root):
    for name in FOREIGN:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("{}")
    carried = set(carried_files(root, index(root)))
    assert carried <= set(pipeline_files(root, index(root)))


def test_shards_by_any_plain_name(root):
    part = root / "vae"
    (part / "diffusion_pytorch_model.safetensors").rename(part / "mine_a.safetensors")
    file = part / "diffusion_pytorch_model.safetensors.index.json"
    shards = {"a": "mine_a.safetensors", "b": "mine_b.safetensors"}
    file.write_text(json.dumps({"weight_map": shards}))
    assert missing_weights(part) == ["mine_b.safetensors"]
    assert {"mine_a.safetensors", file.name} <= {p.name for p in component_files(part)}
    file.write_text(json.dumps({"weight_map": {"a": "../../../x.safetensors"}}))
    with pytest.raises(ConfigError, match="no plain name"):
        pipeline_folder(str(root), weights=False)


@pytest.mark.parametrize("name", ["../../leak", "/leak"])
def test_a_component_elsewhere(root, name):
    """Its files would be copied out of data/."""
    values = index(root) | {name: ["diffusers", "AutoencoderKL"]}
    (root / "model_index.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"model_index\.json names .*no plain name"):
        pipeline_folder(str(root), weights=False)


def test_a_pipe_among_the_settings_does_not_hang(root):
    (root / "vae" / "config.json").unlink()
    os.mkfifo(root / "vae" / "config.json")
    with pytest.raises(ConfigError, match=r"config\.json is a pipe"):
        pipeline_folder(str(root), weights=False)


@pytest.mark.parametrize("name", ["flux2", "qwen_image", "z_image", "wan"])
def test_all_that_diffusers_writes_is_carried_and_let_through(name, tmp_path):
    """Families whose text encoders are language models: templates of chats, processors."""
    root = family_folder(tmp_path, name)
    assert set(carried_files(root, index(root))) == {p for p in root.rglob("*") if p.is_file()}
    refuse_doors(root)


@pytest.fixture
def blob(tmp_path):
    file = tmp_path / "models--org--name" / "blobs" / ("0" * 64)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    return file


def test_a_blob_is_linked_through_its_snapshot(blob, tmp_path):
    (tmp_path / "link").symlink_to(blob)
    place(tmp_path / "link", tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_ino == blob.stat().st_ino
    assert not (tmp_path / "copy").is_symlink()


def test_a_blob_on_another_file_system_is_copied(blob, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    place(blob, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"weights"
    assert (tmp_path / "copy").stat().st_ino != blob.stat().st_ino


@pytest.mark.parametrize("clones", [False, True])
def test_a_users_file_shares_nothing_with_its_copy(tmp_path, monkeypatch, clones):
    def ioctl(new, request, old):
        if not clones:
            raise OSError(95, "Operation not supported")
        new.write(b"weights")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"weights")
    (tmp_path / "link").symlink_to(mine)
    place(tmp_path / "link", tmp_path / "copy")
    mine.write_bytes(b"another")
    assert (tmp_path / "copy").read_bytes() == b"weights"
    assert (tmp_path / "copy").stat().st_ino != mine.stat().st_ino
