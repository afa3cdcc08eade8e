"""What is read of a capture is checked, and no more than that."""

import pytest
import torch
import zarr

from dirotq.errors import ArtifactError
from dirotq.models.family import Site
from dirotq.quantize.moments import Captured, write_moment

SITES = [Site(name, (name,), 4, (4,), "block", bias=False) for name in ("blocks.0.a", "blocks.0.b")]


@pytest.fixture
def capture(store):
    with store.create("capture", {"made": "here"}) as draft:
        group = zarr.open_group(draft.data / "moments.zarr", mode="a")
        for number, site in enumerate(SITES):
            write_moment(group, site.name, 4, 2, total=None, rows=torch.full((2, 4), 1.0 + number))
    return draft.artifact


def test_a_site_is_checked_when_it_is_read(capture):
    first, second = SITES
    (chunk,) = (
        p
        for p in (capture.data / "moments.zarr" / second.name).rglob("*")
        if p.name == "0" and p.is_file()
    )
    chunk.write_bytes(bytes(chunk.stat().st_size))
    captured = Captured(capture)
    assert torch.equal(captured.stored_moment(first)[0], torch.ones(2, 4))
    with pytest.raises(ArtifactError, match=r"blocks\.0\.b.* changed after it was written"):
        captured.stored_moment(second)


def test_what_others_read_is_not_hashed_here(capture):
    Captured(capture).stored_moment(SITES[0])
    assert {name.split("/")[1] for name in capture.seen} == {"zarr.json", SITES[0].name}


def test_a_file_that_nobody_wrote_is_refused_beside_its_site(capture):
    (capture.data / "moments.zarr" / SITES[0].name / "stranger").write_text("1")
    with pytest.raises(ArtifactError, match="stranger was not written by the stage"):
        Captured(capture).stored_moment(SITES[0])
