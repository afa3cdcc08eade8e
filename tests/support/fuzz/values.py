"""What fuzzing feeds to readers: odd values, edited JSON, damaged bytes."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

ODD_NUMBERS = (
    0, -1, 1, 2**31, 2**53, 2**53 + 1, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, 10**400,
    0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
ODD_TEXTS = (
    "", " ", "\0", "\ud800", "\ufeff", "a\nb", "../../x", "/etc/passwd", "~", "*", "[1]", "{}",
    "null", "x" * 1000, "é", "NaN", "1e400", "True", "'", '"',
)  # fmt: skip
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(max_size=12)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.sampled_from(ODD_NUMBERS)
    | st.floats()
    | TEXTS
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def edited(draw: st.DrawFn, original: Any) -> Any:
    """``original`` JSON with up to four nodes changed, taken out, doubled or added."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(0, 4))):
        value = _edit(draw, value)
    return value


def as_json(value: Any) -> str:
    """``value`` as text, NaN and lone surrogates included."""
    return json.dumps(value)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` as it is, cut, with bytes changed, or with some put in."""
    made = bytearray(content)
    for kind in draw(st.lists(st.sampled_from(("cut", "change", "insert")), max_size=3)):
        at = draw(st.integers(0, len(made)))
        if kind == "cut":
            del made[at:]
        elif kind == "change" and at < len(made):
            made[at] = draw(st.integers(0, 255))
        else:
            made[at:at] = draw(st.binary(max_size=8))
    return bytes(made)


def _edit(draw: st.DrawFn, value: Any) -> Any:
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        match draw(st.sampled_from(("inside", "inside", "remove", "add", "rename"))):
            case "inside":
                value[key] = _edit(draw, value[key])
            case "remove":
                del value[key]
            case "rename":
                value[draw(TEXTS)] = value.pop(key)
            case "add":
                value[draw(TEXTS)] = draw(VALUES)
        return value
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(value) - 1))
        match draw(st.sampled_from(("inside", "inside", "remove", "double"))):
            case "inside":
                value[at] = _edit(draw, value[at])
            case "remove":
                del value[at]
            case "double":
                value.insert(at, copy.deepcopy(value[at]))
        return value
    return draw(VALUES)
