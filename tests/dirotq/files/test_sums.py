import ast
import json
import os
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_line import tree_bytes

import dirotq
from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.files.sums import (
    SUMS,
    check_part,
    check_sums,
    read_sums,
    renewing,
    unchecked,
    write_sums,
)
from dirotq.packed.folder import packed_folder as checked
from dirotq.pipeline.locks import is_held

HEX = "0" * 64


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder of a few bytes in the shape of a packed one."""
    root = tmp_path / "small"
    (root / "part").mkdir(parents=True)
    index = {"_class_name": "X", "part": ["diffusers", "Y"], "off": [None, None], "flag": True}
    (root / "model_index.json").write_text(json.dumps(index))
    (root / "part" / "config.json").write_text("{}")
    (root / "part" / "x.safetensors").write_bytes(b"weights")
    write_sums(root)
    return root


@pytest.mark.parametrize("name", ["plain", "it's", 'say "$HOME"', "back\\slash ü"])
def test_the_advised_command_names_the_folder(tmp_path, name):
    command, flag, code = shlex.split(renewing(tmp_path / name).strip("`"))
    assert (command, flag) == ("python", "-c")
    assert ast.literal_eval(code.partition("write_sums(")[2].removesuffix(")")) == str(
        tmp_path / name
    )


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    file.write_bytes(data)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # two writes in one tick of the clock


def test_a_packed_folder_lists_what_is_read_and_coreutils_agree(finished):
    model = finished["pack"].data / "model"
    listed = set(read_sums(model))
    assert listed == set(tree_bytes(model)) - {"README.md", SUMS}
    done = subprocess.run(["sha256sum", "--strict", "-c", SUMS], cwd=model, capture_output=True)
    assert done.returncode == 0, done.stderr


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), bit=st.integers(0, 2**31))
def test_a_flipped_bit_in_any_file_that_is_read_is_found(finished, tmp_path, data, bit):
    """Also in the list itself; by the path that compress prints, and in a copy."""
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(finished["pack"].data / "model", copy)
    name = data.draw(st.sampled_from([*read_sums(copy), SUMS]))
    listed = read_sums(copy)
    flip(copy / name, bit)
    with suppress(ArtifactError):
        assume(name != SUMS or read_sums(copy) != listed)  # a capital letter, say
    with pytest.raises(ArtifactError, match=r"changed|damaged|missing|not list"):
        checked(copy)


@pytest.mark.parametrize("by", ["artifact", "data/model", "link"])
def test_in_a_store_the_manifest_counts_too(finished, tmp_path, by):
    artifact = Path(shutil.copytree(finished["pack"].path, tmp_path / "pack" / "1f3a"))
    (tmp_path / "link").symlink_to(artifact / "data" / "model")
    where = {"artifact": artifact, "data/model": artifact / "data/model", "link": tmp_path / "link"}
    checked(where[by])
    (artifact / "data/model" / SUMS).unlink()  # as DiRotQ 0.1.0 left it, but not as the stage did
    with pytest.raises(ArtifactError, match=f"model/{SUMS} is missing"):
        checked(where[by])
    checked(where[by], verify=False)


def test_a_folder_of_a_store_is_not_taken_away_while_it_is_read(finished, monkeypatch):
    path, seen = finished["pack"].path, []
    monkeypatch.setattr("dirotq.loading.open_pipeline", lambda *_, **__: seen.append(is_held(path)))
    dirotq.load(path)
    dirotq.load(path / "data" / "model")
    assert seen == [True, True]
    assert not is_held(path)


def test_an_old_store_is_held_against_its_manifest(finished, tmp_path, caplog):
    artifact = Path(shutil.copytree(finished["pack"].path, tmp_path / "pack" / "1f3a"))
    (artifact / "data/model" / SUMS).unlink()
    manifest = json.loads((artifact / "manifest.json").read_text())
    del manifest["files"][f"model/{SUMS}"], manifest["digest"]
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    checked(artifact / "data/model")
    assert not caplog.records
    flip(artifact / "data/model/vae/diffusion_pytorch_model.safetensors", 9000)
    with pytest.raises(ArtifactError, match=r"vae/.* changed after it was written"):
        checked(artifact / "data/model")


def test_a_folder_without_a_list_says_so_once(packed_folder, caplog):
    dirotq.load(packed_folder, device="cpu")
    assert not caplog.records
    (packed_folder / SUMS).unlink()
    dirotq.load(packed_folder, device="cpu")
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "can't be checked" in caplog.text
    assert "write_sums" in caplog.text


def test_other_peoples_manifest_files_are_not_ours(packed_folder, tmp_path):
    place = tmp_path / "web" / "data" / "model"
    shutil.copytree(packed_folder, place)
    (tmp_path / "web" / "manifest.json").write_text('{"name": "app"}')
    checked(place)


def test_verify_false_takes_a_changed_folder(packed_folder):
    config = packed_folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": 2.0}))
    with pytest.raises(ArtifactError, match=r"scheduler_config.json changed.*verify=False"):
        dirotq.load(packed_folder, device="cpu")
    pipe = dirotq.load(packed_folder, device="cpu", verify=False)
    assert pipe.scheduler.config.shift == 2.0
    write_sums(packed_folder)
    dirotq.load(packed_folder, device="cpu")


def test_plain_diffusers_checks_the_transformers_own_files(packed_folder):
    (weights,) = (packed_folder / "transformer").glob("*.safetensors")
    flip(weights, 8 * (weights.stat().st_size - 1))  # a weight: the header stays right
    for load in (
        lambda: FluxTransformer2DModel.from_pretrained(packed_folder / "transformer"),
        lambda: DiffusionPipeline.from_pretrained(packed_folder),
    ):
        with pytest.raises(ArtifactError, match=f"{weights.name} changed"):
            load()
    dirotq.load(packed_folder, device="cpu", verify=False)
    with unchecked():
        check_part(packed_folder / "transformer")
    with pytest.raises(ArtifactError):
        check_part(packed_folder / "transformer")


def test_links_to_blobs_are_read_through(small, tmp_path):
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    shutil.move(small / "part" / "x.safetensors", blob)
    (small / "part" / "x.safetensors").symlink_to(blob)
    assert check_sums(small)
    flip(blob, 3)
    with pytest.raises(ArtifactError, match=r"x.safetensors changed"):
        check_sums(small)


@pytest.mark.parametrize(
    "name",
    ["part/README.md", "part/.gitattributes", "part/LICENSE", "part/LICENSE.txt", "a.png", "x.py",
     "part/shot.PNG", ".cache/huggingface/x.json", "samples/config.json", "off/config.json"],
)  # fmt: skip
def test_what_nobody_reads_may_be_added(small, name):
    (small / name).parent.mkdir(parents=True, exist_ok=True)
    (small / name).write_text("x")
    assert check_sums(small)


@pytest.mark.parametrize(
    "name",
    ["generation.json", "part/model.safetensors", "part/added_tokens.json", "part/merges.txt",
     "part/spiece.model", "part/chat_template.jinja", "part/more/x.json", "part/code.py"],
)  # fmt: skip
def test_what_is_read_may_not(small, name):
    (small / name).parent.mkdir(exist_ok=True)
    (small / name).write_text("x")
    with pytest.raises(ArtifactError, match=rf"{name} would be read, but {SUMS} does not list it"):
        check_sums(small)


def test_a_linked_folder_inside_a_component_is_a_stranger(small, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (small / "part" / "more").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="part/more would be read"):
        check_sums(small)
    with pytest.raises(UnsupportedError, match="can't be listed"):
        write_sums(small)


def test_a_missing_file_is_named(small):
    (small / "part" / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"part/config.json is missing: SHA256SUMS lists it"):
        check_sums(small)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no file"),
        ("\n \n", "lists no file"),
        ("hello", "is no line"),
        (f"{HEX[:-1]}g  part/config.json", "is no line"),
        (f"{HEX[:-1]}  part/config.json", "is no line"),
        (f"{HEX}  ../secret", "no path inside"),
        (f"{HEX}  part/../../secret", "no path inside"),
        (f"{HEX}  /etc/passwd", "no path inside"),
        (f"{HEX}  part//config.json", "no path inside"),
        (f"{HEX}  .", "no path inside"),
        (f"{HEX}  a\\b", "no path inside"),
        (f"{HEX}  a\0b", "no path inside"),
        (f"{HEX}  a\n{HEX} *a", "comes twice"),
        (b"\xff\xfe", "is damaged"),
    ],
)
def test_an_odd_list_is_refused(small, text, message):
    (small / SUMS).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArtifactError, match=message):
        check_sums(small)


@pytest.mark.parametrize("kind", ["fifo", "folder", "broken link"])
def test_a_list_that_is_no_file_is_refused(small, kind):
    (small / SUMS).unlink()
    if kind == "fifo":
        os.mkfifo(small / SUMS)
    elif kind == "folder":
        (small / SUMS).mkdir()
    else:
        (small / SUMS).symlink_to("nowhere")
    with pytest.raises(ArtifactError, match="no plain file"):
        check_sums(small)


def test_a_list_written_elsewhere_is_understood(small):
    lines = (small / SUMS).read_text().splitlines()
    changed = [line[:64].upper() + " *./" + line[66:] for line in lines]
    (small / SUMS).write_text("\r\n".join(changed) + "\r\n")
    assert check_sums(small)
    assert read_sums(small) == {line[66:]: line[:64] for line in lines}


def test_files_are_hashed_once_per_process(small, monkeypatch):
    check_sums(small)
    monkeypatch.setattr("dirotq.files.digest._settled", lambda _: True)  # as a second after writing
    check_sums(small)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("hashed again"))
    assert check_sums(small)
