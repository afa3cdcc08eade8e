import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirotq.errors import ConfigError
from dirotq.pipeline.stage import Stage, fingerprint, recipe, untracked

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    side: str
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Toy:
    part: Part
    scale: float
    version: ClassVar[str] = "1"
    device: str = untracked(default="cpu")

    def run(self, out: Path) -> dict[str, float]:
        return {}


class Folder:
    """Knows what it holds."""

    def __init__(self, path: str, digest: str) -> None:
        self.path, self.digest = path, digest

    def identity(self) -> dict[str, str]:
        return {"sha256": self.digest}


TOY = Toy(Part("LEFT", (1, 2)), 0.5)


@given(JSON)
def test_recipe_of_json_is_itself(value):
    assert recipe(value) == value
    assert fingerprint(recipe(value)) == fingerprint(json.loads(json.dumps(value)))


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_order_of_keys_does_not_matter(value):
    assert fingerprint(dict(reversed(value.items()))) == fingerprint(value)


@pytest.mark.parametrize(
    "change",
    [{"scale": 0.25}, {"part": Part("RIGHT", (1, 2))}, {"part": Part("LEFT", (2, 1))}],
)
def test_every_tracked_field_counts(change):
    assert fingerprint(recipe(dataclasses.replace(TOY, **change))) != fingerprint(recipe(TOY))


def test_untracked_field_does_not_count():
    assert recipe(dataclasses.replace(TOY, device="cuda")) == recipe(TOY)


def test_version_and_class_count(monkeypatch):
    before = recipe(TOY)
    monkeypatch.setattr(Toy, "version", "2")
    assert recipe(TOY) == before | {"version": "2"}
    assert before["class"].endswith(".Toy")


def test_identity_replaces_the_fields():
    assert recipe(Folder("here", "abc")) == recipe(Folder("there", "abc")) == {"sha256": "abc"}
    assert recipe(Folder("here", "abc")) != recipe(Folder("here", "abd"))


@pytest.mark.parametrize("value", [object(), Path("x"), {1, 2}, b"x", Toy, [object()]])
def test_what_has_no_stable_identity_is_refused(value):
    with pytest.raises(ConfigError, match="cannot fingerprint"):
        recipe(value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_json_lacks_are_refused(value):
    with pytest.raises(ConfigError, match="cannot fingerprint"):
        fingerprint(recipe({"x": value}))


def test_a_dataclass_with_version_and_run_is_a_stage():
    assert isinstance(TOY, Stage)
    assert not isinstance(TOY.part, Stage)
