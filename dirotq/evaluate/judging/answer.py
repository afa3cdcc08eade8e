"""A judge's answer: one definition for the schema that servers enforce and the check we do."""

import json
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

Verdict = Literal["A", "B", "tie"]

FENCE = re.compile(r"\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*", re.DOTALL)


class MalformedAnswer(ValueError):
    """The text is no answer; the message says why, in words that a model can act on."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Refusal(_Strict):
    """The judge declines, in the form that the rubric offers for it."""

    refusal: str


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("reasons must be given")
    return text


class Judgement(_Strict):
    """One criterion. Reasons come first: the verdict should follow from them."""

    # A validator and no `min_length`, which some servers' schemas don't know.
    reasons: Annotated[str, AfterValidator(_not_blank)]
    verdict: Verdict


class Answer(_Strict):
    """Both criteria."""

    perceptual_quality: Judgement
    prompt_alignment: Judgement


CRITERIA: tuple[str, ...] = tuple(Answer.model_fields)

SCHEMA: dict[str, Any] = Answer.model_json_schema()
"""JSON schema of an answer, for servers that can hold a model to one."""


def parse_answer(text: str) -> Answer | Refusal:
    """Read a judge's text: a JSON object, alone or in one Markdown fence.

    Raises MalformedAnswer for anything else, such as a missing criterion, an unknown field, a
    verdict that is not exactly A, B or tie, or blank reasons.
    """
    fenced = FENCE.fullmatch(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except ValueError as error:
        raise MalformedAnswer(f"it is not one JSON object and nothing else ({error})") from error
    kind = Refusal if isinstance(value, dict) and "refusal" in value else Answer
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, e['loc'])) or 'the answer'}: {e['msg']}" for e in error.errors()
        )
        raise MalformedAnswer("; ".join(problems)) from error
