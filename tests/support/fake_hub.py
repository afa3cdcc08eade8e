"""A Hugging Face Hub with one repository, org/tiny, behind huggingface_hub's functions.

What they leave on disk is laid out as the real ones do it: blobs named by their content, snapshots
of links, the list of a commit's files. Offline, the real functions read it.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import dirotq.sources.hub

__all__ = ["COMMIT", "HOME", "REAL_DOWNLOAD", "blob_id", "hub", "pulled_plug", "snapshot"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HOME = "models--org--tiny"
REAL_DOWNLOAD = huggingface_hub.snapshot_download


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were downloaded, in order. They come from ``tmp_path / "remote"``."""
    fetched: list[str] = []
    remote = Path(shutil.copytree(folder, tmp_path / "remote"))
    # What a repository also holds, and nobody needs.
    (remote / "whole.safetensors").touch()
    for name in ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"):
        (remote / "transformer" / name).touch()
    home = tmp_path / "hub" / HOME

    def download(repo, *, repo_type, revision, allow_patterns):
        assert (repo, repo_type, revision) == ("org/tiny", "model", COMMIT)
        write_list(home, remote)
        for name in _files(remote):
            target = snapshot(tmp_path) / name
            wanted = any(
                Path(name).match(p) and name.count("/") == p.count("/") for p in allow_patterns
            )
            if wanted and not target.exists():
                fetched.append(name)
                blob = home / "blobs" / blob_id(remote / name)
                blob.parent.mkdir(exist_ok=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                if not blob.exists():
                    shutil.copyfile(remote / name, blob)
                target.unlink(missing_ok=True)
                target.symlink_to(Path(*[".."] * (name.count("/") + 2), "blobs", blob.name))
        return str(snapshot(tmp_path))

    class Api:
        def repo_info(self, repo, *, revision, repo_type, timeout):
            assert (repo, revision) == ("org/tiny", "main")
            (home / "refs").mkdir(parents=True, exist_ok=True)
            (home / "refs" / "main").write_text(COMMIT)
            return huggingface_hub.hf_api.ModelInfo(id=repo, sha=COMMIT)

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return fetched


def snapshot(tmp_path: Path) -> Path:
    return tmp_path / "hub" / HOME / "snapshots" / COMMIT


def blob_id(file: Path) -> str:
    """SHA-256 of weights, git's SHA-1 of everything else."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def write_list(home: Path, remote: Path) -> None:
    files = {}
    for name in _files(remote):
        entry = {"size": (remote / name).stat().st_size, "blob_id": "0" * 40}
        known = blob_id(remote / name)
        files[name] = entry | ({"lfs_sha256": known} if len(known) == 64 else {"blob_id": known})
    (home / "trees").mkdir(parents=True, exist_ok=True)
    listed = {"format_version": 1, "files": files}
    (home / "trees" / f"{COMMIT}.json").write_text(json.dumps(listed))


def pulled_plug(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network from now on, in a process that asked for nothing yet."""

    class Api:
        def repo_info(self, *_, **__):
            raise errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", _real_download)
    fresh_process()


def fresh_process() -> None:
    dirotq.sources.hub._commit.cache_clear()
    dirotq.sources.hub._fetched.cache_clear()


def _real_download(*args, **kwargs):
    return REAL_DOWNLOAD(*args, cache_dir=constants.HF_HUB_CACHE, **kwargs)


def _files(remote: Path) -> Iterator[str]:
    return (p.relative_to(remote).as_posix() for p in sorted(remote.rglob("*")) if p.is_file())
