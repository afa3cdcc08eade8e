import shutil

import pytest

from dirotq.pipeline.lineage import lineage, settings, stage_settings
from dirotq.pipeline.store import ArtifactStore


@pytest.fixture
def chain(tmp_path):
    """c reads b, b reads a: {stage: artifact}."""
    store, made = ArtifactStore(tmp_path / "store"), {}
    recipes = {
        "a": {"batch": 4, "version": "3", "class": "A", "model": {"call": {"height": 8}}},
        "b": {"method": {"name": "m", "class": "M"}, "digest": "f" * 64, "path": "f" * 63},
        "c": {"learned": {}},
    }
    above: dict = {}
    for name, recipe in recipes.items():
        with store.create(name, {"stage": recipe, "inputs": above}) as draft:
            pass
        made[name] = draft.artifact
        above = {name: str(draft.artifact)}
    return made


def test_all_that_an_artifact_was_made_from(chain):
    found = lineage([chain["c"]])
    assert found == chain
    assert settings(found) == {
        "a.batch": 4,
        "b.path": "f" * 63,
        "method.name": "m",
        "model.call.height": 8,
    }


def test_what_is_gone_or_damaged_is_left_out(chain):
    (chain["a"].path / "manifest.json").write_text("{}")
    fresh = lineage([type(chain["c"])("c", chain["c"].fingerprint, chain["c"].path)])
    assert list(fresh) == ["c", "b"]
    shutil.rmtree(chain["b"].path)
    assert list(lineage([type(chain["c"])("c", chain["c"].fingerprint, chain["c"].path)])) == ["c"]


@pytest.mark.parametrize("recipe", [None, "text", []])
def test_a_recipe_of_another_kind_has_no_settings(recipe):
    assert stage_settings("a", recipe) == {}
