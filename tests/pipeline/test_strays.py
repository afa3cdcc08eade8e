"""What workers leave that died, or were taken for dead and write on."""

import pytest

from dirotq.errors import ArtifactError
from dirotq.pipeline.store import ArtifactStore
from dirotq.pipeline.units import JOURNAL, Units

NAMES = ["a", "b"]


def fill(out):
    units = Units(out)
    for name in NAMES:
        (out / name).write_text(f"content of {name}")
        units.finish(name, [out / name])
    return units


def finished(out):
    units = Units(out)
    return [name for name in NAMES if units.done(name)]


def test_a_file_that_changed_after_its_unit_was_finished_is_not_published(store_root):
    store = ArtifactStore(store_root)
    with (
        pytest.raises(ArtifactError, match=r"^b changed after 'b' was finished"),
        store.create("stage", {"made": "here"}) as draft,
    ):
        fill(draft.data)
        (draft.data / "b").write_text("half")
    assert store.list() == []
    with store.create("stage", {"made": "here"}, resume=True) as draft:
        assert finished(draft.data) == ["a"]


def test_what_belongs_to_no_finished_unit_is_swept_away(tmp_path):
    units = fill(tmp_path)
    for stranger in ("a.half", f"{JOURNAL}/.x.json.half", "empty/folder/x"):
        (tmp_path / stranger).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / stranger).write_text("half")
    units.sweep()
    assert {path.name for path in tmp_path.iterdir()} == {*NAMES, JOURNAL}
    assert len(list((tmp_path / JOURNAL).iterdir())) == len(NAMES)
    assert finished(tmp_path) == NAMES
