import shutil

import pytest
import torch
import zarr

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.quantize import tensors
from dirotq.quantize.tensors import (
    ahead,
    create_array,
    load_site,
    read_array,
    save_site,
    site_file,
    write_rows,
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int8])
def test_array_round_trip(tmp_path, dtype):
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    create_array(group, "a.b.0.c", (10, 6), dtype)
    rows = (100 * torch.randn(10, 6)).to(dtype)
    write_rows(group, "a.b.0.c", 0, rows[:4])
    write_rows(group, "a.b.0.c", 4, rows[4:])
    again = read_array(zarr.open_group(tmp_path / "x.zarr", mode="r"), "a.b.0.c")
    assert again.dtype == dtype
    assert torch.equal(again, rows)


def test_rows_are_written_in_the_dtype_of_the_array(tmp_path):
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    create_array(group, "a", (2, 3), torch.bfloat16)
    rows = torch.randn(3, 2).T  # float32, not contiguous
    write_rows(group, "a", 0, rows)
    assert torch.equal(read_array(group, "a"), rows.to(torch.bfloat16))


def test_chunks_of_zeros_are_written_too(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "BYTES_PER_CHUNK", 24)
    # A missing chunk would read as zeros as well, and a lost one could not be told from it.
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    create_array(group, "a", (8, 3), torch.float32)
    write_rows(group, "a", 0, torch.zeros(8, 3))
    assert group["a"].nchunks_initialized == 4


@pytest.mark.parametrize(("rows", "chunk"), [(10, 10), (65, 33), (78, 39), (1176, 62)])
def test_chunks_divide_an_array_evenly(tmp_path, monkeypatch, rows, chunk):
    # Zarr fills the last chunk up: 78 tiles in chunks of 64 would take the room of 128.
    monkeypatch.setattr(tensors, "BYTES_PER_CHUNK", 64 * 4 * 6)
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    create_array(group, "a", (rows, 2, 3), torch.float32)
    assert group["a"].chunks == (chunk, 2, 3)


def test_site_round_trip(tmp_path):
    content = {
        "codes": torch.randint(-7, 8, (4, 6), dtype=torch.int8).T,
        "scale": torch.randn(4, 1).bfloat16(),
        "loss": torch.randn(2, dtype=torch.float64),
    }
    save_site(tmp_path / "sites", "blocks.0.ff.net.2", content)
    file = tmp_path / "sites" / "blocks.0.ff.net.2.safetensors"
    assert list((tmp_path / "sites").iterdir()) == [file]
    again = load_site(file)
    assert again.keys() == content.keys()
    for name, tensor in content.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)


def test_an_interrupted_write_leaves_no_site(tmp_path, monkeypatch):
    def killed(content, path):
        path.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(tensors, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_site(tmp_path, "site", {"x": torch.zeros(2)})
    assert not (tmp_path / "site.safetensors").exists()


@pytest.fixture
def chunked(tmp_path, monkeypatch):
    """A group with an array of four chunks, open."""
    monkeypatch.setattr(tensors, "BYTES_PER_CHUNK", 24)
    group = zarr.open_group(tmp_path / "x.zarr", mode="w")
    create_array(group, "a.b", (8, 3), torch.float32)
    write_rows(group, "a.b", 0, torch.ones(8, 3))
    return group


@pytest.mark.parametrize("lost", range(4))
def test_a_missing_chunk_is_an_error_not_zeros(chunked, tmp_path, lost):
    (tmp_path / "x.zarr" / "a.b" / "c" / str(lost) / "0").unlink()
    (tmp_path / "x.zarr" / "a.b" / "c" / str(lost) / "0.half.partial").touch()
    with pytest.raises(ArtifactError, match=r"x\.zarr/a\.b has 3 of its 4 chunks.*same command"):
        read_array(chunked, "a.b")


@pytest.mark.parametrize("file", ["c/2/0", "zarr.json"])
@pytest.mark.parametrize("content", [b"", b"{"])
def test_a_torn_file_of_an_array_is_an_error_with_its_name(chunked, tmp_path, file, content):
    (tmp_path / "x.zarr" / "a.b" / file).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.zarr/a\.b is .*damaged.*same command"):
        read_array(chunked, "a.b")


def test_an_array_that_was_removed_while_its_group_is_open(chunked, tmp_path):
    shutil.rmtree(tmp_path / "x.zarr")
    with pytest.raises(ArtifactError, match=r"x\.zarr/a\.b is gone"):
        read_array(chunked, "a.b")


@pytest.mark.parametrize("site", ["a/b", "../x", "/x"])
def test_a_site_cannot_name_a_folder(tmp_path, site):
    with pytest.raises(UnsupportedError, match=f"site {site}"):
        save_site(tmp_path, site, {"x": torch.zeros(2)})
    with pytest.raises(UnsupportedError):
        site_file(site)


def test_one_item_is_loaded_ahead_and_no_more():
    loaded = []
    seen = []
    for item, value in ahead(lambda i: loaded.append(i) or 10 * i, range(4)):
        seen.append((item, value))
        assert max(loaded) <= item + 1
    assert seen == [(0, 0), (1, 10), (2, 20), (3, 30)]
