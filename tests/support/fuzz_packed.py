"""Packed folders with odd settings: what anybody may send, with digests that fit.

``odd_settings(folder)`` is a strategy of changed JSON files, ``load_odd`` loads a folder with one
of them. Only DiRotQ's own errors may leave, and soon.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fair_time import fair_seconds
from hypothesis import strategies as st

import dirotq
from dirotq.errors import DirotqError
from dirotq.files.sums import SUMS

SLOW = 5.0
"""Seconds after which a user would think that it hangs."""
SKIPPED = ("tokenizer.json", "generation.json")
"""Files that no setting stands in, or that loading does not read."""

odd_numbers = st.sampled_from(
    [0, 1, -1, 2, 7, 10**6, 10**9, 2**63, -(10**9), 0.5, 1e308, float("nan"), float("inf")]
)
odd_texts = st.sampled_from(
    ["", "1", "dirotq", "..", "../../x", "/etc", "a.b", "os", "FluxPipeline", "\0", "é" * 300]
)
odd_values = st.recursive(
    st.none() | st.booleans() | odd_numbers | odd_texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(odd_texts, inner, max_size=2),
    max_leaves=4,
)


class Odd(NamedTuple):
    """One file of a packed folder, with other content."""

    file: str
    text: str


@st.composite
def odd_settings(draw: Any, folder: Path) -> Odd:
    """A JSON file of ``folder`` in which up to three things are replaced, removed, doubled or
    added, or that is cut off."""
    files = sorted(
        p.relative_to(folder).as_posix()
        for p in folder.rglob("*.json")
        if p.name not in SKIPPED and p.name != SUMS
    )
    # The transformer's is what is ours.
    file = draw(st.sampled_from(files) | st.just("transformer/config.json"))
    text = (folder / file).read_text()
    if draw(st.integers(0, 19)) == 0:
        return Odd(file, text[: draw(st.integers(0, len(text) - 3))])
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if places:
            _change(draw, *draw(st.sampled_from(places)))
    if draw(st.integers(0, 29)) == 0:
        value = draw(odd_values)
    return Odd(file, json.dumps(value))


def load_odd(folder: Path, odd: Odd) -> str:
    """Load a copy of ``folder`` with that file; what it came to.

    Raises AssertionError if anything but DirotqError leaves, or after SLOW seconds.
    """
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "packed"
        shutil.copytree(folder, root, copy_function=_link)
        (root / SUMS).unlink(missing_ok=True)
        (root / odd.file).unlink()
        (root / odd.file).write_text(odd.text)
        start = fair_seconds()
        try:
            dirotq.load(root, device="cpu")
            said = "loaded"
        except DirotqError as error:
            said = f"{type(error).__name__}: {error}"
        except Exception as error:
            raise AssertionError(f"{odd.file}: {type(error).__name__} left") from error
        took = fair_seconds() - start
    assert took < SLOW, f"{odd.file}: {took:.1f} s, then {said}"
    return said


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in nested JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _change(draw: Any, container: Any, key: Any) -> None:
    action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "double", "add"]))
    if action == "replace":
        container[key] = draw(odd_values)
    elif action == "remove":
        del container[key]
    elif action == "double" and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif isinstance(container, dict):
        container[draw(odd_texts)] = draw(odd_values)


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)
