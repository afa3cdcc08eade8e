"""The table of docs/quality.md: rows, paired differences, and where it is put."""

import pytest

from dirotq.benchmarks.quality import BEGIN, END, put, table


def report(*psnr: float) -> dict:
    return {
        "images": [{"psnr": value} for value in psnr],
        "metrics": {
            "psnr": sum(psnr) / len(psnr),
            "ssim": 0.99,
            "attributes": 0.98,
            "attributes_original": 0.99,
            "bits_per_parameter": 5.5,
        },
        "device": "CPU",
    }


def test_a_row_per_method_with_its_paired_difference():
    lines = table({"rtn": report(30.0, 34.0), "ours": report(40.0, 45.0)}).splitlines()
    assert lines[2] == "| rtn | 32.00 |  | 0.9900 | 98.00% | 5.50 |"
    # Differences are 10 and 11: a bootstrap mean can be nothing outside of them.
    assert lines[3].startswith("| ours | 42.50 | +10.50 [+10.00, +11.00] |")
    assert lines[4] == "| 16 bit | | | | 99.00% | 16 |"
    assert "2 held-out captions" in lines[-1]


def test_reports_of_other_prompts_are_not_compared():
    with pytest.raises(ValueError, match="longer"):
        table({"rtn": report(30.0, 34.0), "ours": report(40.0)})


def test_only_the_marked_part_of_a_document_changes(tmp_path):
    document = tmp_path / "quality.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put(document, "new\n")
    assert document.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
