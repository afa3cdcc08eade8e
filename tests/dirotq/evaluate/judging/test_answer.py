import contextlib
import json

import pytest
from chat_server import answer
from hypothesis import given
from hypothesis import strategies as st

from dirotq.evaluate.judging.answer import (
    CRITERIA,
    SCHEMA,
    Answer,
    MalformedAnswer,
    Refusal,
    parse_answer,
)


def changed(**changes):
    return json.dumps(json.loads(answer("A", "B")) | changes)


def test_a_good_answer():
    found = parse_answer(answer("A", "tie"))
    assert isinstance(found, Answer)
    assert found.perceptual_quality.verdict == "A"
    assert found.prompt_alignment.verdict == "tie"


def test_in_a_markdown_fence():
    assert parse_answer(f"```json\n{answer('B')}\n```\n") == parse_answer(answer("B"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not one JSON object"),
        ("I like A more.", "not one JSON object"),
        ("Sure! " + answer(), "not one JSON object"),
        (answer()[:-5], "not one JSON object"),
        ("[]", "the answer: "),
        ("null", "the answer: "),
        ("{}", "perceptual_quality: Field required; prompt_alignment: Field required"),
        (changed(score=3), "score: Extra inputs are not permitted"),
        (changed(prompt_alignment="A"), "prompt_alignment: "),
        (changed(prompt_alignment={"reasons": "x", "verdict": "a"}), "'A', 'B' or 'tie'"),
        (changed(prompt_alignment={"reasons": "x", "verdict": None}), "'A', 'B' or 'tie'"),
        (changed(prompt_alignment={"reasons": " ", "verdict": "A"}), "reasons must be given"),
        (changed(prompt_alignment={"reasons": ["x"], "verdict": "A"}), "valid string"),
        (changed(refusal="no"), "Extra inputs are not permitted"),
    ],
)
def test_anything_else_is_malformed_and_says_why(text, problem):
    with pytest.raises(MalformedAnswer) as caught:
        parse_answer(text)
    assert problem in str(caught.value)


def test_a_refusal_in_the_offered_form():
    assert parse_answer('{"refusal": "a person"}') == Refusal(refusal="a person")


def test_the_schema_is_what_strict_servers_take():
    """Every object closed, every field required, reasons before the verdict."""
    assert tuple(SCHEMA["properties"]) == CRITERIA
    for part in (SCHEMA, *SCHEMA["$defs"].values()):
        assert part["additionalProperties"] is False
        assert part["required"] == list(part["properties"])
    assert list(SCHEMA["$defs"]["Judgement"]["properties"]) == ["reasons", "verdict"]


@given(st.text())
def test_no_text_breaks_the_parser(text):
    with contextlib.suppress(MalformedAnswer):
        parse_answer(text)


@given(st.sampled_from(["A", "B", "tie"]), st.text(min_size=1).filter(str.strip))
def test_round_trip(verdict, reasons):
    part = {"reasons": reasons, "verdict": verdict}
    value = {"perceptual_quality": part, "prompt_alignment": part}
    found = parse_answer(json.dumps(value))
    assert isinstance(found, Answer)
    assert found.model_dump() == value
