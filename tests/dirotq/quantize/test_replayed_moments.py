"""Sums that several processes make one after the other are those of one, in every family."""

import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import pytest
import torch
from tiny_families import TINY
from tiny_line import tree_bytes
from tiny_pipelines import family_folder

from dirotq.calibrate.relay import Relay
from dirotq.models.call import Call
from dirotq.pipeline.divided import NotShared
from dirotq.quantize import replayed_moments
from dirotq.quantize.replayed_moments import ReplayedMoments
from dirotq.sources.model import DiffusersModel


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def replay(tiny_root):
    """``replay("sana")``: what replays calls of a family."""

    def make(name):
        model = DiffusersModel(path=str(family_folder(tiny_root, name)), call={})
        return ReplayedMoments(model=model, shards=(), rows=7, vram=None, device="cpu")

    return make


def calls(name, count=5):
    """Calls that differ."""
    given = TINY[name].inputs()
    change = lambda scale: lambda t: t * scale if t.is_floating_point() else t  # noqa: E731
    return [Call((), given).map(change(1 + 0.1 * i)) for i in range(count)]


@pytest.fixture
def shared(monkeypatch):
    """``shared(replay, count, out, calls)``: done in threads that meet as processes do; the units
    that each has finished.
    """

    def patient(relay, file, *, there):
        end = time.monotonic() + 20
        while file.exists() != there:
            assert time.monotonic() < end
            time.sleep(0.001)

    def run(replay, count, out, given):
        # Making a network without weights changes torch for all threads: it is done before.
        networks, sites = [replay.model.skeleton() for _ in range(count)], replay.model.sites()
        with monkeypatch.context() as patch, ThreadPoolExecutor(count) as pool:
            patch.setattr(Relay, "_until", patient)
            patch.setattr(DiffusersModel, "skeleton", lambda _: networks.pop())
            patch.setattr(DiffusersModel, "sites", lambda _: sites)
            parts = [replay.part(i, count, out / "meeting") for i in range(count)]
            made = [pool.submit(list, part.made(out, given, part.units())) for part in parts]
            for first in as_completed(made):  # the others wait for one that failed
                first.result()
            return [[name for name, _ in one.result()] for one in made]

    return run


@pytest.mark.parametrize("name", ["sana", "pixart", "qwen_image", "z_image"])
def test_sums_do_not_depend_on_how_calls_are_shared(replay, shared, tmp_path, name):
    """Of two families with sites outside of all blocks, and two that mask or refine text."""
    one, given, found = replay(name), calls(name), {}
    for count in (1, 2, 3):
        out = tmp_path / str(count)
        out.mkdir()
        units = shared(one, count, out, given)
        assert sorted(units.pop()) == sorted(one.units())
        assert not any(units)  # only the last one finishes any
        found[count] = tree_bytes(out)
    assert len(found[1]) > 10 and any("triangle" in str(b) for b in found[1].values())
    assert found[1] == found[2] == found[3]


def test_fewer_calls_than_processes_are_not_shared(replay, shared, tmp_path):
    given = calls("pixart", 2)
    with pytest.raises(NotShared, match="no room for 1 of 2 calls"):
        shared(replay("pixart"), 3, tmp_path, given)


def test_calls_that_do_not_fit_are_not_shared(replay, shared, tmp_path, monkeypatch):
    monkeypatch.setattr(replayed_moments.Replay, "make_room", lambda *_: 2)
    with pytest.raises(NotShared, match="no room for 3 of 5 calls"):
        shared(replay("pixart"), 2, tmp_path, calls("flux2"))


@pytest.fixture
def pair(tmp_path):
    cpu = torch.device("cpu")
    with Relay(tmp_path, 0, 2, cpu) as first, Relay(tmp_path, 1, 2, cpu) as second:
        yield first, second


def test_who_passes_another_block_is_told(pair):
    first, second = pair
    first.hand("blocks.1", {})
    with pytest.raises(NotShared, match=r"one 'blocks\.1', another 'blocks\.0'"):
        second.take("blocks.0", {})


def test_a_site_that_was_seen_before_is_not_taken_over(pair, replay):
    site = replay("pixart").model.sites()[0]
    first, second = pair
    one = replayed_moments.Seen(tokens=3)
    first.hand("blocks.0", {site: one})
    with pytest.raises(NotShared, match="is passed more than once"):
        second.take("blocks.0", {site: one})


def test_who_waits_stops_when_it_is_given_up(tmp_path):
    with (
        ThreadPoolExecutor(1) as pool,
        Relay(tmp_path, 0, 2, torch.device("cpu")) as first,
    ):
        first.hand("blocks.0", {})
        second = pool.submit(first.hand, "blocks.1", {})  # nobody takes the first
        first.__exit__(None, None, None)
        with pytest.raises(NotShared, match="given up"):
            second.result(timeout=10)
