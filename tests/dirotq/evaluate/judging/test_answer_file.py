import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirotq.evaluate.judging.answer_file import append_answer, read_answers

ROWS = [{"n": 0, "text": "zwei\nZeilen ✓"}, {"n": 1, "text": "x"}]


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "answers.jsonl"
    for row in ROWS:
        append_answer(file, row)
    return file


def test_nothing_yet(tmp_path):
    assert read_answers(tmp_path / "answers.jsonl") == []


def test_one_line_a_row_with_its_digest(file):
    assert read_answers(file) == ROWS
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(len(line.pop("sha256")) == 64 for line in lines)
    assert lines == ROWS


def test_each_row_is_forced_to_the_disk(file, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    append_answer(file, {"n": 2})
    assert synced == [file.stat().st_size]


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_torn_last_line_is_cut_off_and_written_over(file, cut):
    """Wherever it was torn, its newline included: only a whole line counts."""
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    assert read_answers(file) == ROWS[:1]
    append_answer(file, ROWS[1])
    assert file.read_bytes() == whole


def test_a_last_line_of_zeros_is_torn_too(file):
    with file.open("ab") as f:
        f.write(b"\0" * 40 + b"\n")
    assert read_answers(file) == ROWS
    append_answer(file, {"n": 2})
    assert read_answers(file) == [*ROWS, {"n": 2}]


def test_a_damaged_line_is_cut_out_and_said(file, caplog):
    first, second = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(first[:5] + b"\n" + second)
    assert read_answers(file) == ROWS[1:]
    assert file.read_bytes() == second
    assert "1 damaged answers will be asked for again" in caplog.text
    append_answer(file, ROWS[0])
    assert read_answers(file) == ROWS[::-1]
    assert [p.name for p in file.parent.iterdir() if p.is_file()] == [file.name]


@pytest.mark.parametrize("line", ["", "5", "[]", '{"n": 0}', '{"n": 0, "sha256": 5}', "[" * 10_000])
def test_a_line_without_its_digest_is_none(file, line):
    """As versions before 0.4 wrote them, and worse."""
    file.write_text(f"{line}\n")
    assert read_answers(file) == []


@given(st.data())
def test_no_flipped_bit_becomes_another_answer(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "flipped.jsonl"
    file.unlink(missing_ok=True)
    for row in ROWS:
        append_answer(file, row)
    content = bytearray(file.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    assert read_answers(file) in ([], ROWS[:1], ROWS[1:])
