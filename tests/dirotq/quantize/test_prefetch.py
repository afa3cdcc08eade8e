import pytest

from dirotq.models.family import Site
from dirotq.pipeline.units import Units
from dirotq.quantize.prefetch import ahead, unfinished
from dirotq.quantize.tensors import site_file

SITES = [
    Site(name=name, linears=(name,), in_features=8, out_features=(8,), kind="block", bias=False)
    for name in ("a", "b", "c", "d")
]


def test_one_item_is_loaded_ahead_and_no_more():
    loaded = []
    seen = []
    for item, value in ahead(lambda i: loaded.append(i) or 10 * i, range(4)):
        seen.append((item, value))
        assert max(loaded) <= item + 1
    assert seen == [(0, 0), (1, 10), (2, 20), (3, 30)]


def test_what_was_written_before_a_kill_is_not_loaded_again(tmp_path):
    def through(stop_at):
        out = []
        for site, loaded in unfinished(SITES, Units(tmp_path), tmp_path, lambda s: s.name, "x"):
            assert loaded == site.name
            out.append(site.name)
            if site.name == stop_at:
                raise KeyboardInterrupt
            (tmp_path / site_file(site.name)).write_text(site.name)
        return out

    with pytest.raises(KeyboardInterrupt):
        through("c")
    assert through(None) == ["c", "d"]
    (tmp_path / site_file("b")).write_text("B")  # damaged: its digest is another one
    assert through(None) == ["b"]
    assert through(None) == []
