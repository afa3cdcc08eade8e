from dirotq.evaluate.judging.answer import MalformedAnswer, parse_answer
from dirotq.evaluate.judging.pair import Correction
from dirotq.evaluate.judging.rubric import Slot


def test_the_pair_stands_between_its_names(rubric, pair):
    system, user = rubric.conversation(pair, [])
    assert (system.role, user.role) == ("system", "user")
    assert user.parts[:5] == (
        "Prompt: a red square", "Image A:", Slot.FIRST, "Image B:", Slot.SECOND,
    )  # fmt: skip


def test_both_criteria_are_explained(rubric, pair):
    (task,) = rubric.conversation(pair, [])[0].parts
    for name in ("perceptual_quality", "prompt_alignment"):
        assert f"- {name}: {getattr(rubric, name)}" in task


def test_an_error_goes_back_with_the_answer_that_had_it(rubric, pair):
    try:
        parse_answer('{"verdict": "A"}')
    except MalformedAnswer as error:
        problem = str(error)
    turns = rubric.conversation(pair, [Correction('{"verdict": "A"}', problem)])
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[2].parts == ('{"verdict": "A"}',)
    assert problem in turns[3].parts[0]
    assert "perceptual_quality: Field required" in problem
