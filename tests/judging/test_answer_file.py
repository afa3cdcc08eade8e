import json
import os

import pytest

from dirotq.errors import ArtifactError
from dirotq.judging.answer_file import AnswerFile

ROWS = [{"n": 0, "text": "zwei\nZeilen ✓"}, {"n": 1, "text": "x"}]


@pytest.fixture
def file(tmp_path):
    file = AnswerFile(tmp_path / "answers.jsonl")
    for row in ROWS:
        file.append(row)
    return file


def test_nothing_yet(tmp_path):
    assert AnswerFile(tmp_path / "answers.jsonl").read() == []


def test_one_line_a_row(file):
    assert file.read() == ROWS
    assert [json.loads(line) for line in file.path.read_text().splitlines()] == ROWS


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


def test_a_damaged_line_before_the_last_is_an_error(file):
    first, second = file.path.read_bytes().splitlines(keepends=True)
    file.path.write_bytes(first[:5] + b"\n" + second)
    with pytest.raises(ArtifactError, match="line 1: damaged"):
        file.read()
