import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dirotq.evaluate.judging.answer_file import AnswerFile

ROWS = [{"n": 0, "text": "zwei\nZeilen ✓"}, {"n": 1, "text": "x"}]


@pytest.fixture
def file(tmp_path):
    file = AnswerFile(tmp_path / "answers.jsonl")
    for row in ROWS:
        file.append(row)
    return file


def test_nothing_yet(tmp_path):
    assert AnswerFile(tmp_path / "answers.jsonl").read() == []


def test_one_line_a_row_with_its_digest(file):
    assert file.read() == ROWS
    lines = [json.loads(line) for line in file.path.read_text().splitlines()]
    assert all(len(line.pop("sha256")) == 64 for line in lines)
    assert lines == ROWS


def test_each_row_is_forced_to_the_disk(file, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    file.append({"n": 2})
    assert synced == [file.path.stat().st_size]


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_torn_last_line_is_cut_off_and_written_over(file, cut):
    """Wherever it was torn, its newline included: only a whole line counts."""
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-cut])
    assert file.read() == ROWS[:1]
    file.append(ROWS[1])
    assert file.path.read_bytes() == whole


def test_a_last_line_of_zeros_is_torn_too(file):
    with file.path.open("ab") as f:
        f.write(b"\0" * 40 + b"\n")
    assert file.read() == ROWS
    file.append({"n": 2})
    assert file.read() == [*ROWS, {"n": 2}]


def test_a_damaged_line_is_cut_out_and_said(file, caplog):
    first, second = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(first[:5] + b"\n" + second)
    assert file.read() == ROWS[1:]
    assert file.path.read_bytes() == second
    assert "1 damaged answers will be asked for again" in caplog.text
    file.append(ROWS[0])
    assert file.read() == ROWS[::-1]
    assert [p.name for p in file.path.parent.iterdir() if p.is_file()] == [file.path.name]


@pytest.mark.parametrize("line", ["", "5", "[]", '{"n": 0}', '{"n": 0, "sha256": 5}', "[" * 10_000])
def test_a_line_without_its_digest_is_none(file, line):
    """As versions before 0.4 wrote them, and worse."""
    file.path.write_text(f"{line}\n")
    assert file.read() == []


@given(st.data())
def test_no_flipped_bit_becomes_another_answer(tmp_path_factory, data):
    file = AnswerFile(tmp_path_factory.getbasetemp() / "flipped.jsonl")
    file.path.unlink(missing_ok=True)
    for row in ROWS:
        file.append(row)
    content = bytearray(file.path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    file.path.write_bytes(content)
    assert file.read() in ([], ROWS[:1], ROWS[1:])
