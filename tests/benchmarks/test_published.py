"""Rows to CSV and back, and tables into a document."""

from dataclasses import dataclass

import pytest

from dirotq.benchmarks.published import append, put, read


@dataclass(frozen=True)
class Row:
    case: str
    value: float | None = None
    note: str = ""


def test_rows_survive_csv(tmp_path):
    path = tmp_path / "deep" / "rows.csv"
    first, second = Row("a", 1.25), Row("b", None, "failed: out, of memory")
    append(path, [first])
    append(path, [second, first])
    assert read(path, Row) == [first, second, first]
    assert path.read_text().count("case,value,note") == 1


def test_numbers_have_five_digits(tmp_path):
    append(tmp_path / "rows.csv", [Row("a", 12.34567)])
    assert read(tmp_path / "rows.csv", Row) == [Row("a", 12.346)]


def test_only_the_marked_part_of_a_document_changes(tmp_path):
    document = tmp_path / "quality.md"
    document.write_text("a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n")
    put(document, "x", "new\n")
    assert document.read_text() == "a\n<!-- begin: x -->\nnew\n<!-- end: x -->\nb\n"


@pytest.mark.parametrize("text", ["nothing\n", "<!-- begin: x -->\n"])
def test_a_document_without_markers_is_left_alone(tmp_path, text):
    document = tmp_path / "quality.md"
    document.write_text(text)
    with pytest.raises(ValueError, match="has no <!-- begin: x -->"):
        put(document, "x", "new\n")
    assert document.read_text() == text
