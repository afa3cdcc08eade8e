"""The rows of docs/quality.md, what is stored of them, and the tables made of that."""

import json

import pytest

from dirotq.benchmarks import quality_rows
from dirotq.benchmarks.quality import chosen_rows, refuse_other_count, store, summary
from dirotq.benchmarks.quality_table import CLAIMS, claims, compared, methods, read, tables
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config


def report(*psnr: float) -> dict:
    names = ("psnr", "ssim", "ms_ssim", "fid", "kid", "attributes")
    metrics = {"psnr": sum(psnr) / len(psnr), "ssim": 0.99, "ms_ssim": 0.999, "fid": 0.01}
    metrics |= {"kid": 0.002, "attributes": 0.98, "bits_per_parameter": 5.5}
    metrics |= {f"{name}_floor": 1.0 for name in names} | {"attributes_original": 0.99}
    image = {"ssim": 0.9, "ms_ssim": 0.9, "captioned": 1.0, "original": {"captioned": 1.0}}
    floor = {"psnr": 99.0, "ssim": 1.0, "ms_ssim": 1.0, "captioned": 1.0}
    return {
        "images": [{"psnr": value, "floor": floor} | image for value in psnr],
        "metrics": metrics,
        "dtype": "float32",
        "device": "CPU",
    }


def made(key: str, *psnr: float) -> dict:
    """A result of a row, as ``measured`` returns it."""
    (row,) = (row for row in quality_rows.rows() if row.key == key)
    return summary(report(*psnr), {}) | {"overrides": list(row.overrides), "seconds": 1.0}


@pytest.fixture
def results(tmp_path):
    """Two rows stored as the benchmark stores them, read back."""
    file = tmp_path / "tiny_flux.json"
    for key, psnr in {"svdquant": (30.0, 34.0), "dirotq_g64": (33.0, 38.0)}.items():
        store(file, key, made(key, *psnr))
    return json.loads(file.read_text())


def test_shared_scores_are_stored_once_and_a_row_can_be_replaced(tmp_path, results):
    assert results["baselines"]["float32"]["floor"]["psnr"] == [99.0, 99.0]
    assert results["baselines"]["float32"]["original"]["captioned"] == [1.0, 1.0]
    assert "floor" not in results["rows"]["svdquant"]
    file = tmp_path / "tiny_flux.json"
    store(file, "svdquant", made("svdquant", 1.0, 2.0))
    again = json.loads(file.read_text())
    assert again["rows"]["svdquant"]["images"]["psnr"] == [1.0, 2.0]
    assert again["rows"]["dirotq_g64"] == results["rows"]["dirotq_g64"]


def test_what_is_defined_otherwise_by_now_is_dropped_and_is_in_no_table(tmp_path, results):
    file = tmp_path / "tiny_flux.json"
    assert read(file) == results
    results["rows"]["svdquant"]["overrides"] = ["method=svdquant", "rank.r=8"]
    results["rows"]["gone"] = results["rows"]["dirotq_g64"]
    file.write_text(json.dumps(results))
    with pytest.raises(SystemExit, match="rows gone, svdquant are not defined so"):
        read(file)
    store(file, "rtn", made("rtn", 1.0, 2.0))
    assert read(file)["rows"].keys() == {"dirotq_g64", "rtn"}


def test_a_method_stands_beside_its_rival_image_by_image(results):
    lines = methods(results).splitlines()
    assert lines[2].startswith("| svdquant, g64/g64 | 32.00 |  | 32.00 | 0 | 0.9900 |")
    # Differences are 3 and 4: a bootstrap mean can be nothing outside of them.
    assert "| 35.50 | +3.50 [+3.00, +4.00] | 35.50 | 0 |" in lines[3]
    assert "99.00%" in lines[-1]
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_a_claim_is_reached_or_missed(results):
    text = claims({"tiny_flux": results})
    assert "| +2.5 | +3.50 [+3.00, +4.00] | reached |" in text
    assert text.count("tiny_flux") == 1  # the other claims lack a row
    results["rows"]["dirotq_g64"]["images"]["psnr"] = [31.0, 35.0]
    assert "missed" in claims({"tiny_flux": results})


def test_rows_of_another_precision_are_not_compared(results):
    results["rows"]["rtn"] = results["rows"]["svdquant"] | {"dtype": "bfloat16"}
    assert "other precision" in methods(results)


def test_sections_without_results_have_a_head_only(results):
    assert len(compared(quality_rows.ABLATIONS, {"tiny_flux": results}).splitlines()) == 2
    assert set(tables({"tiny_flux": results})) >= {"claims", "ablations", "methods tiny_flux"}


def test_the_document_is_what_its_rows_give(request):
    root = request.config.rootpath
    text = (root / "docs" / "quality.md").read_text()
    files = [root / "docs" / "quality" / f"{model}.json" for model in quality_rows.MODELS]
    tables_now = tables({file.stem: read(file) for file in files})
    assert [
        name for name, table in tables_now.items() if f"{name} -->\n{table}<!-- end" not in text
    ] == []


def test_keys_are_distinct_and_every_base_and_claim_is_a_row():
    keys = [row.key for row in quality_rows.rows()]
    assert len(set(keys)) == len(keys)
    assert {row.base for row in quality_rows.rows()} <= set(keys)
    assert {key for claim in CLAIMS for key in (claim.row, claim.base)} <= set(keys)


def test_the_row_of_the_default_is_the_default():
    (row,) = (row for row in quality_rows.rows() if row.key == "default")
    asked = compose_config([quality_rows.EXPERIMENT, *row.overrides], "dirotq.conf")
    assert asked.method == compose_config([], "dirotq.conf").method


def test_rows_are_chosen_by_key_and_the_longest_come_first():
    chosen = chosen_rows(["methods", "allocation"], None)
    assert {row.key for row in chosen} == {
        row.key for row in (*quality_rows.METHODS, *quality_rows.ALLOCATION)
    }
    keys = [row.key for row in chosen]
    assert max(map(keys.index, ("default", "budget"))) < keys.index("rtn")
    assert [row.key for row in chosen_rows(["methods"], ["rtn", "default"])] == ["default", "rtn"]


def test_a_row_that_there_is_not_is_refused_by_name():
    with pytest.raises(SystemExit, match="--rows rnt: no such rows in methods; there are rtn, "):
        chosen_rows(["methods"], ["rnt", "rtn"])


# Each takes most of a second; what is left out is a field of these.
@pytest.mark.parametrize(
    "row",
    [*quality_rows.METHODS, *quality_rows.FORMATS, *quality_rows.ALLOCATION],
    ids=lambda row: row.key,
)
def test_rows_are_valid_configurations(row):
    overrides = [quality_rows.EXPERIMENT, "model=tiny_pixart", *row.overrides]
    assert build(compose_config(overrides, "dirotq.conf")).steps


def test_rows_of_another_number_of_captions_are_refused_beforehand(tmp_path, results):
    refuse_other_count(tmp_path / "tiny_flux.json", 2)
    refuse_other_count(tmp_path / "absent.json", 7)
    with pytest.raises(SystemExit, match=r"holds rows of 2 captions, these would have 7.*--out"):
        refuse_other_count(tmp_path / "tiny_flux.json", 7)
