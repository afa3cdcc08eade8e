"""Files with digests go to a remote place and back: in parallel, resumed, never mixed up."""

import hashlib
import random

import pytest
from faulty_files import FaultyFiles
from faulty_files import faulty as faulty

from dirotq.errors import ArtifactError
from dirotq.pipeline import parcels, remote
from dirotq.pipeline.manifest import DamagedError
from dirotq.pipeline.remote import Remote


@pytest.fixture
def place(faulty, monkeypatch):
    monkeypatch.setattr(parcels, "LARGE", 1000)
    monkeypatch.setattr(parcels, "THREADS", 2)
    return Remote("faulty://far")


@pytest.fixture
def folder(tmp_path):
    return made(tmp_path / "near", seed=0)


def made(folder, seed):
    """Files of 0 to 40 kB in nested folders."""
    choose = random.Random(seed)
    for number, size in enumerate((0, 1, 999, 1000, 5000, 9000, 20_000, 40_000)):
        path = folder / f"{number % 3}" / f"{number}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(choose.randbytes(size))
    return folder


def files_of(folder):
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        found[path.relative_to(folder).as_posix()] = entry
    return found


def send(place, folder, **options):
    return parcels.send(place, "x", files_of(folder), lambda name: folder / name, **options)


TOTAL = 76_000


def test_there_and_back(place, folder, tmp_path):
    assert send(place, folder).sent == TOTAL
    assert parcels.fetch(place, "x", files_of(folder), tmp_path / "back").sent == TOTAL
    assert files_of(tmp_path / "back") == files_of(folder)
    parcels.settle(place, "x", files_of(folder))
    assert not [name for name in FaultyFiles.store if name.endswith(parcels.SENT)]


def test_a_bad_network_loses_nothing(place, faulty, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 30)
    faulty.share = faulty.cut = 0.15
    for number in range(5):
        send(place, folder, again=True)
        parcels.fetch(place, "x", files_of(folder), tmp_path / str(number))
        assert files_of(tmp_path / str(number)) == files_of(folder)
    assert faulty.failed > 5


def test_what_arrived_is_not_sent_again(place, faulty, folder):
    faulty.after = 12
    with pytest.raises(ArtifactError, match="the network is gone"):
        send(place, folder)
    faulty.after = None
    moved = send(place, folder)
    assert 0 < moved.there < TOTAL
    assert moved.sent + moved.there == TOTAL
    again = send(place, folder)
    assert again.sent == 1000  # small files have no note
    assert send(place, folder, again=True).sent == TOTAL


def test_a_cut_file_is_sent_again_though_it_is_there(place, faulty, folder):
    name = "0/6.bin"
    place.write(f"x/{name}", (folder / name).read_bytes()[:70])
    assert send(place, folder).there == 0
    place.write(f"x/{name}", b"")  # its note says that it arrived; its size does not
    assert send(place, folder).sent == 1000 + 20_000


def test_another_file_of_the_same_size_does_not_count(place, folder, tmp_path):
    """Two versions of one folder take turns, and each is interrupted."""
    other = made(tmp_path / "other", seed=1)
    send(place, folder)
    assert send(place, other).there == 0
    assert send(place, folder).there == 0
    parcels.fetch(place, "x", files_of(folder), tmp_path / "back")


def test_a_note_goes_before_its_file_is_replaced(place, faulty, folder, tmp_path, monkeypatch):
    other = made(tmp_path / "other", seed=1)
    send(place, folder)
    with monkeypatch.context() as patch:
        patch.setattr(place, "write", lambda name, data: None)  # killed before the new note
        send(place, other)
    assert send(place, folder).there == 0
    parcels.fetch(place, "x", files_of(folder), tmp_path / "back")


@pytest.mark.parametrize("left", [b"", b"other bytes", b"y" * 30_000])
def test_what_an_interrupted_fetch_left_is_used_or_dropped(left, place, folder, tmp_path):
    send(place, folder)
    back = made(tmp_path / "back", seed=0)
    (back / "0" / "6.bin").write_bytes(left)
    (back / "stranger").write_text("not theirs")
    moved = parcels.fetch(place, "x", files_of(folder), back)
    assert files_of(back) == files_of(folder)
    assert moved == parcels.Moved(20_000, TOTAL - 20_000)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1] + b"\0", "there is 20000 bytes with the sha256"),
        (lambda data: data[:50], "there is 50 bytes"),
        (lambda data: None, "there is no such object"),
    ],
)
def test_damage_there_is_named(damage, says, place, folder, tmp_path):
    send(place, folder)
    name = "/far/x/0/6.bin"
    data = damage(FaultyFiles.store[name].getvalue())
    FaultyFiles().rm_file(name)
    if data is not None:
        place.write("x/0/6.bin", data)
    with pytest.raises(DamagedError, match=rf"faulty://far/x/0/6.bin is damaged: {says}"):
        parcels.fetch(place, "x", files_of(folder), tmp_path / "back")
    send(place, folder, again=True)
    parcels.fetch(place, "x", files_of(folder), tmp_path / "back")
    assert files_of(tmp_path / "back") == files_of(folder)
