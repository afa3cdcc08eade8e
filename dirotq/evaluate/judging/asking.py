"""Ask every question, so many at a time, and keep every answer."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError
from dirotq.evaluate.judging.answer import MalformedAnswer, Refusal, parse_answer
from dirotq.evaluate.judging.answer_file import Row, append_answer, read_answers
from dirotq.evaluate.judging.backend import Backend, Compare, Unanswered
from dirotq.evaluate.judging.questions import Correction, Pair, Question, question_of
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
    file: Path,
    *,
    attempts: int,
    failures: float,
) -> list[Row]:
    """Ask what ``file`` doesn't answer yet, append each answer as it comes; return all rows.

    pair_of   the images of a question, called from several threads
    attempts  answers of the wrong form before a question counts as invalid
    failures  share of the questions that may fail for good

    Interrupted, it waits for the questions under way and keeps their answers.
    Raises ConfigError once more than ``failures`` of the questions failed.
    """
    rows = {question_of(row): row for row in read_answers(file)}
    todo = [q for q in questions if q not in rows or rows[q]["outcome"] == "failed"]
    if not todo:
        return [rows[question] for question in questions]
    stop, failed = threading.Event(), 0

    def answer(question: Question) -> Row:
        pair = pair_of(question)
        return {
            **asdict(question),
            "prompt": pair.prompt.text,
            "seed": pair.prompt.seed,
            "model": backend.name,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            **ask(compare, pair, attempts),
        }

    with backend.open(rubric, stop) as compare, ThreadPoolExecutor(backend.concurrency) as pool:
        jobs = [pool.submit(answer, question) for question in todo]
        try:
            for job in track(as_completed(jobs), "answers", total=len(jobs)):
                row = job.result()
                append_answer(file, row)
                rows[question_of(row)] = row
                failed += row["outcome"] == "failed"
                if failed > failures * len(questions):
                    raise ConfigError(
                        f"{failed} of {len(questions)} questions to {backend.name} failed for "
                        f"good, the last one with: {row['detail']}. Answers so far are kept: mend "
                        "it and run the same command again, or allow more with judge.failures=0.1"
                    )
        except BaseException:
            stop.set()
            _keep_what_comes(jobs, rows, file)
            raise
    return [rows[question] for question in questions]


def ask(compare: Compare, pair: Pair, attempts: int) -> dict[str, Any]:
    """Ask one question until an answer passes: outcome, answer, detail, texts, retries, seconds.

    An answer of the wrong form goes back with what is wrong with it, ``attempts`` times in all.
    """
    began = time.monotonic()
    row: dict[str, Any] = {"outcome": "invalid", "answer": None, "detail": None}
    row |= {"texts": [], "retries": 0}
    corrections: list[Correction] = []
    while row["outcome"] == "invalid" and len(corrections) < attempts:
        try:
            reply = compare(pair, corrections)
        except Unanswered as error:
            row |= {"outcome": "failed", "detail": str(error)}
            row["retries"] += error.retries
            break
        row["texts"].append(reply.text)
        row["retries"] += reply.retries
        try:
            answer = Refusal(refusal=reply.text) if reply.refused else parse_answer(reply.text)
        except MalformedAnswer as error:
            row["detail"] = str(error)
            corrections.append(Correction(reply.text, str(error)))
            continue
        if isinstance(answer, Refusal):
            row |= {"outcome": "refused", "detail": answer.refusal}
        else:
            row |= {"outcome": "answered", "detail": None, "answer": answer.model_dump()}
    return row | {"seconds": round(time.monotonic() - began, 3)}


def _keep_what_comes(jobs: Iterable[Future[Row]], rows: dict[Question, Row], file: Path) -> None:
    """Drop what was not sent, wait for the rest, write answers that were not written yet."""
    for job in [job for job in jobs if not job.cancel()]:
        # Whatever went wrong in another thread, the first error is the one to report.
        with suppress(Exception):
            row = job.result()
            if row["outcome"] != "failed" and rows.get(question_of(row)) is not row:
                append_answer(file, row)
