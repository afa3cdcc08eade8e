"""Ask every question, bounded, and keep every answer."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from dirotq.errors import ConfigError
from dirotq.evaluate.judging.answer import MalformedAnswer, Refusal, parse_answer
from dirotq.evaluate.judging.answer_file import AnswerFile, Row
from dirotq.evaluate.judging.backend import Backend, Compare, Unanswered
from dirotq.evaluate.judging.pair import Correction, Pair
from dirotq.evaluate.judging.questions import Question, key_of
from dirotq.evaluate.judging.rubric import Rubric
from dirotq.progress import track

OUTCOMES = ("answered", "refused", "invalid", "failed")
"""``invalid``: no answer of the right form within the attempts. ``failed``: none came at all; only
these are asked again by a later run."""


def ask_all(
    backend: Backend,
    rubric: Rubric,
    questions: Sequence[Question],
    pair_of: Callable[[Question], Pair],
    file: AnswerFile,
    *,
    attempts: int,
    failures: float,
) -> list[Row]:
    """Ask what ``file`` doesn't answer yet, and append each answer as it comes; all rows.

    pair_of   the images of a question, called from several threads
    attempts  answers of the wrong form before a question counts as invalid
    failures  share of the questions that may fail for good

    Interrupted, it waits for the questions under way and keeps their answers.
    Raises ConfigError once more than ``failures`` of the questions failed.
    """
    rows = {key_of(row): row for row in file.read()}
    todo = [q for q in questions if rows.get(q.key, {"outcome": "failed"})["outcome"] == "failed"]
    if not todo:
        return [rows[q.key] for q in questions]
    allowed, failed = failures * len(questions), 0
    stop = threading.Event()

    def answer(question: Question) -> Row:
        pair = pair_of(question)
        return _head(question, pair, backend.name) | ask(compare, pair, attempts)

    with backend.open(rubric, stop) as compare, ThreadPoolExecutor(backend.concurrency) as pool:
        jobs = [pool.submit(answer, question) for question in todo]
        try:
            for job in track(as_completed(jobs), "answers", total=len(jobs)):
                row = job.result()
                file.append(row)
                rows[key_of(row)] = row
                failed += row["outcome"] == "failed"
                if failed > allowed:
                    raise ConfigError(
                        f"{failed} of {len(questions)} questions to {backend.name} failed for "
                        f"good, the last one with: {row['detail']}. Answers so far are kept: mend "
                        "it and run the same command again, or allow more with judge.failures=0.1"
                    )
        except BaseException:
            stop.set()
            _keep_what_comes(jobs, rows, file)
            raise
    return [rows[question.key] for question in questions]


def ask(compare: Compare, pair: Pair, attempts: int) -> dict[str, Any]:
    """One question until an answer passes: outcome, answer, detail, texts, retries, seconds.

    An answer of the wrong form goes back with what is wrong with it, ``attempts`` times in all.
    """
    began = time.monotonic()
    corrections: list[Correction] = []
    texts: list[str] = []
    retries = 0

    def result(outcome: str, detail: str | None = None, answer: Any = None) -> dict[str, Any]:
        return {
            "outcome": outcome,
            "answer": answer,
            "detail": detail,
            "texts": texts,
            "retries": retries,
            "seconds": round(time.monotonic() - began, 3),
        }

    while len(texts) < attempts:
        try:
            reply = compare(pair, corrections)
        except Unanswered as error:
            retries += error.retries
            return result("failed", str(error))
        retries += reply.retries
        texts.append(reply.text)
        if reply.refused:
            return result("refused", reply.text)
        try:
            answer = parse_answer(reply.text)
        except MalformedAnswer as error:
            corrections.append(Correction(reply.text, str(error)))
            continue
        if isinstance(answer, Refusal):
            return result("refused", answer.refusal)
        return result("answered", answer=answer.model_dump())
    return result("invalid", corrections[-1].problem)


def _head(question: Question, pair: Pair, model: str) -> Row:
    return {
        "comparison": question.comparison,
        "index": question.index,
        "first": question.first,
        "repeat": question.repeat,
        "prompt": pair.prompt.text,
        "seed": pair.prompt.seed,
        "model": model,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _keep_what_comes(jobs: list[Future[Row]], rows: dict[Any, Row], file: AnswerFile) -> None:
    """Drop what was not sent, wait for the rest, write answers that were not written yet."""
    for job in jobs:
        job.cancel()
    for job in jobs:
        # Whatever went wrong in another thread, the first error is the one to report.
        with suppress(CancelledError, Exception):
            row = job.result()
            if row["outcome"] != "failed" and rows.get(key_of(row)) is not row:
                file.append(row)
