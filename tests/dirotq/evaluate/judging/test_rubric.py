import dataclasses

from dirotq.evaluate.judging.answer import MalformedAnswer, parse_answer
from dirotq.evaluate.judging.questions import Correction


def show(image):
    return {"image": image}


def text(part):
    return {"type": "text", "text": part}


def test_the_pair_stands_between_its_names(rubric, pair):
    system, user = rubric.conversation(pair, [], show)
    assert (system["role"], user["role"]) == ("system", "user")
    assert user["content"][:5] == [
        text("Prompt: a red square"),
        text("Image A:"), {"image": pair.first},
        text("Image B:"), {"image": pair.second},
    ]  # fmt: skip


def test_both_criteria_are_explained(rubric, pair):
    task = rubric.conversation(pair, [], show)[0]["content"]
    for name in ("perceptual_quality", "prompt_alignment"):
        assert f"- {name}: {getattr(rubric, name)}" in task


def test_braces_in_a_rubric_are_words(rubric, pair):
    words = dataclasses.replace(rubric, prompt_alignment="Is there a {cat}?")
    assert "Is there a {cat}?" in words.conversation(pair, [], show)[0]["content"]


def test_an_error_goes_back_with_the_answer_that_had_it(rubric, pair):
    try:
        parse_answer('{"verdict": "A"}')
    except MalformedAnswer as error:
        problem = str(error)
    corrections = [Correction('{"verdict": "A"}', problem)]
    messages = rubric.conversation(pair, corrections, show)
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[2]["content"] == '{"verdict": "A"}'
    assert problem in messages[3]["content"]
    assert "perceptual_quality: Field required" in problem
