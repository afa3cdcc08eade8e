import random

import pytest

from dirotq.evaluate.judging.answer import CRITERIA
from dirotq.evaluate.judging.questions import questions
from dirotq.evaluate.judging.statistics import PAIR_OUTCOMES, pair_outcome, pairs, share, summarize

QUALITY = CRITERIA[0]


def rows(judge, *, prompts=16, repeats=1):
    """What a judge that is a function question -> A, B, tie or an outcome would leave behind."""
    found = []
    for q in questions(["packed"], prompts, repeats):
        said = judge(q)
        answered = said in ("A", "B", "tie")
        verdicts = {c: {"reasons": "seen", "verdict": said} for c in CRITERIA}
        found.append(
            {
                "comparison": q.comparison, "index": q.index, "first": q.first, "repeat": q.repeat,
                "outcome": "answered" if answered else said,
                "answer": verdicts if answered else None, "texts": [said], "retries": 0,
            }
        )  # fmt: skip
    return found


def judged(judge, **counts):
    return summarize(rows(judge, **counts))["packed"]


def prefers_candidate(q):
    return "A" if q.first == "candidate" else "B"


def test_outcomes_of_a_pair():
    marks = (1.0, 0.5, 0.0)
    found = {(a, b): pair_outcome(a, b) for a in marks for b in marks}
    assert found == {
        (1.0, 1.0): "win", (0.5, 0.5): "tie", (0.0, 0.0): "loss",
        **{(a, b): "inconsistent" for a in marks for b in marks if a != b},
    }  # fmt: skip
    assert pair_outcome(None, 1.0) == pair_outcome(0.0, None) == "unjudged"


def test_a_perfect_judge_wins():
    found = judged(prefers_candidate)[QUALITY]
    assert found["outcomes"] == dict.fromkeys(PAIR_OUTCOMES, 0) | {"win": 16}
    assert found["win_rate"]["mean"] == found["decided_win_rate"]["mean"] == 1
    assert 0.75 < found["win_rate"]["low"] < 1  # 16 prompts prove no more than that
    assert found["first_slot"]["mean"] == 0.5
    assert found["order_consistency"]["mean"] == 1


def test_a_perfect_judge_that_prefers_the_reference():
    found = judged(lambda q: "B" if prefers_candidate(q) == "A" else "A")[QUALITY]
    assert found["outcomes"]["loss"] == 16
    assert found["win_rate"]["mean"] == 0


def test_a_judge_that_always_says_a_wins_nothing():
    found = judged(lambda q: "A")[QUALITY]
    assert found["outcomes"] == dict.fromkeys(PAIR_OUTCOMES, 0) | {"inconsistent": 16}
    assert found["win_rate"]["mean"] == 0.5
    assert found["decided_win_rate"] is None
    assert found["first_slot"]["mean"] == 1
    assert found["first_slot"]["low"] > 0.75
    assert found["order_consistency"]["mean"] == 0


def test_a_judge_that_always_ties():
    found = judged(lambda q: "tie")[QUALITY]
    assert found["outcomes"]["tie"] == 16
    assert found["win_rate"]["mean"] == 0.5
    assert found["first_slot"] is None
    assert found["decided_win_rate"] is None


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_of_a_random_judge_covers_a_half(seed):
    draw = random.Random(seed)
    found = judged(lambda q: draw.choice(["A", "B", "tie"]), prompts=200, repeats=2)[QUALITY]
    for name in ("win_rate", "first_slot"):
        assert found[name]["low"] < 0.5 < found[name]["high"]
        assert found[name]["high"] - found[name]["low"] < 0.15
    # Two of three verdicts are alike by chance.
    assert found["self_consistency"]["mean"] == pytest.approx(1 / 3, abs=0.08)


def test_a_small_preference_shows_with_enough_prompts():
    draw = random.Random(0)
    leaning = lambda q: prefers_candidate(q) if draw.random() < 0.7 else draw.choice("AB")  # noqa: E731
    assert judged(leaning, prompts=200)[QUALITY]["win_rate"]["low"] > 0.7


def test_repeats_of_a_prompt_are_no_new_evidence():
    """A judge whose mind is made up per prompt: ten repeats narrow nothing."""
    by_prompt = lambda q: prefers_candidate(q) if q.index % 2 else "tie"  # noqa: E731
    once, often = (judged(by_prompt, prompts=40, repeats=n)[QUALITY] for n in (1, 10))
    assert often["win_rate"] == once["win_rate"]
    assert once["self_consistency"] is None
    assert often["self_consistency"]["mean"] == 1


def test_self_consistency_compares_the_same_order():
    """Always A contradicts itself between orders, never between repeats."""
    found = judged(lambda q: "A", repeats=3)[QUALITY]
    assert found["self_consistency"]["mean"] == 1
    assert found["order_consistency"]["mean"] == 0


def test_what_was_not_answered_is_counted_and_is_no_tie():
    def judge(q):
        if q.index < 3 and q.first == "candidate":
            return ("refused", "invalid", "failed")[q.index]
        return prefers_candidate(q)

    found = judged(judge)
    assert found["requests"] == {
        "asked": 32, "answered": 29, "refused": 1, "invalid": 1, "failed": 1,
        "corrected": 0, "retries": 0,
    }  # fmt: skip
    assert found[QUALITY]["outcomes"] == dict.fromkeys(PAIR_OUTCOMES, 0) | {
        "win": 13, "unjudged": 3,
    }  # fmt: skip
    assert found[QUALITY]["win_rate"]["mean"] == 1
    assert found[QUALITY]["win_rate"]["n"] == 13


def test_half_a_pair_does_not_bias_the_position():
    """The reference's order is missing throughout: nothing can be said about positions."""
    found = judged(lambda q: "refused" if q.first == "reference" else "A")[QUALITY]
    assert found["win_rate"] is found["first_slot"] is None
    assert found["outcomes"]["unjudged"] == 16


def test_criteria_are_apart():
    found = rows(prefers_candidate)
    for row in found:
        row["answer"]["prompt_alignment"]["verdict"] = "tie"
    summary = summarize(found)["packed"]
    assert summary["perceptual_quality"]["outcomes"]["win"] == 16
    assert summary["prompt_alignment"]["outcomes"]["tie"] == 16


def test_pairs_are_sorted_however_the_answers_came():
    found = rows(prefers_candidate, prompts=4, repeats=2)
    random.Random(0).shuffle(found)
    assert list(pairs(found, QUALITY)) == [(i, r) for i in range(4) for r in range(2)]


def test_share_is_a_mean_over_prompts():
    found = share([(1, 2), (1, 1), (0, 0)])
    assert found is not None
    assert (found["mean"], found["n"]) == (0.75, 2)
    assert 0.5 <= found["low"] < 0.75 < found["high"] <= 1
    assert share([(0, 0), (0, 0)]) is None
