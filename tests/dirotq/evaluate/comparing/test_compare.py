"""`dirotq compare`, from the command line to the three files."""

import csv
import json
import re
import time

import pytest
from measured_runs import publish, report, scores
from web_page import Page, refuse_faults

BAD = "<script>alert('x')</script> & =1+1"


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def two(store):
    """Two runs of one model and prompts, the better one larger."""
    return [
        publish(store, report(scores(mean, rank), bits_per_parameter=bits), rank=rank)
        for rank, mean, bits in ((16, 40.0, 5.0), (64, 42.0, 6.0))
    ]


def table(here, name: str = "compare") -> list[dict]:
    return list(csv.DictReader((here / f"{name}.csv").read_text().splitlines()))


def test_all_runs_of_a_store_the_closest_first(dirotq, here, two):
    done = dirotq("compare")
    assert (done.status, done.err) == (0, "")
    assert done.out == "compare.html: 2 runs; compare.csv and compare.json beside it\n"
    rows = table(here)
    assert [row["run"] for row in rows] == [str(two[1]), str(two[0])]
    assert [row["label"] for row in rows] == ["dirotq, rank.r=64", "dirotq, rank.r=16"]
    assert [row["front"] for row in rows] == ["True", "True"]
    assert float(rows[0]["psnr_low"]) < float(rows[0]["psnr"]) < float(rows[0]["psnr_high"])
    content = json.loads((here / "compare.json").read_text())
    assert [row["run"] for row in content["runs"]] == [row["run"] for row in rows]
    [pair] = content["pairs"]
    assert pair["paired"]
    assert pair["one_model"]
    assert pair["psnr_low"] > 1.5
    page = Page((here / "compare.html").read_text())
    refuse_faults(page)
    assert len(page.all("svg")) == 1
    assert len(page.all("option")) == 4
    [answer] = [a for a in page.all("p") if a.get("id") == "answer"]
    [[first, second, mean, low, high, closer]] = json.loads(answer["data-pairs"])
    assert (first, second, closer) == (0, 1, 12)
    assert low < mean < high
    assert "Still good: differences are hard to see" in page.text
    assert re.search(r"Closest: 1\. dirotq, rank\.r=64 \(4[12]\.\d\d dB, 6\.00 bits\)\. "
                     r"Smallest: 2\. dirotq, rank\.r=16 ", page.text)  # fmt: skip


def test_a_run_that_another_beats_is_not_on_the_front(dirotq, here, store, two):
    publish(store, report(scores(39.0, 3), bits_per_parameter=5.5), rank=32)
    assert dirotq("compare").status == 0
    assert [row["front"] for row in table(here)] == ["True", "True", "False"]


def test_names_are_text_and_not_markup_or_formulas(dirotq, here, store, two):
    changed = report(scores(41.0), model=BAD, method="=HYPERLINK(1)", date=BAD, verdict={
        "level": "close", "headline": BAD
    })  # fmt: skip
    changed["images"][0]["prompt"] = BAD
    publish(store, changed)
    assert dirotq("compare").status == 0
    page = Page((here / "compare.html").read_text())
    refuse_faults(page)
    assert BAD in page.text
    assert "alert" not in page.scripts[0]
    assert "'=HYPERLINK(1)" in [row["method"] for row in table(here)]


def test_other_prompts_are_unpaired_and_said(dirotq, here, store, two):
    publish(store, report(scores(41.0), first_seed=100), rank=8)
    done = dirotq("compare")
    assert "some runs have other prompts or seeds than others: these pairs are unpaired" in done.out
    assert "several 16-bit models" not in done.out
    content = json.loads((here / "compare.json").read_text())
    assert sorted(pair["paired"] for pair in content["pairs"]) == [False, False, True]
    assert "unpaired" in Page((here / "compare.html").read_text()).text


def test_several_models_are_said(dirotq, here, store, two):
    for rank in (8, 16):
        publish(store, report(scores(41.0, rank)), rank=rank, model="another")
    assert "several 16-bit models" in dirotq("compare").out
    assert len(Page((here / "compare.html").read_text()).all("svg")) == 2


def test_times_of_the_reference_path_are_said(dirotq, here, store):
    slow = {"packed": "CPU, reference path", "original": "CPU"}
    publish(store, report(scores(41.0), devices=slow))
    done = dirotq("compare")
    assert "reference path say nothing about speed" in done.out
    assert "compare.html: 1 run;" in done.out
    page = Page((here / "compare.html").read_text())
    assert not page.scripts
    assert not page.all("svg")  # one dot says nothing that the table doesn't


def test_runs_by_name_by_what_they_were_made_from_and_by_folder(dirotq, here, store, two):
    rank = next(a for a in store.list() if str(a) == two[0].manifest["recipe"]["inputs"]["rank"])
    for word in (str(two[0]), two[0].fingerprint[:9], str(rank), str(two[0].path)):
        assert dirotq("compare", word, "--overwrite").status == 0
        assert [row["run"] for row in table(here)] == [str(two[0])]


def test_a_run_s_folder_and_one_that_was_interrupted(dirotq, here, store, two):
    for name, artifact in (("one", str(two[0])), ("other", "validate/" + 16 * "0")):
        folder = store.root / "runs" / name
        folder.mkdir(parents=True)
        (folder / "artifacts.json").write_text(json.dumps({"validate": artifact}))
    done = dirotq("compare", "one", str(store.root / "runs" / "other"))
    assert done.status == 0
    assert "runs/other was interrupted, or stopped on purpose, before it was measured" in done.out
    assert [row["run"] for row in table(here)] == [str(two[0])]
    done = dirotq("compare", "other", "--overwrite")
    assert done.status == 2
    assert "there is nothing to compare" in done.err
    (store.root / "runs" / "other" / "artifacts.json").write_text("{")
    assert "no valid JSON" in dirotq("compare", "other", "--overwrite").err


def test_what_was_interrupted_in_the_store_is_said(dirotq, here, store, two):
    (store.root / "validate" / f"{16 * 'a'}.partial").mkdir()
    assert f"left out: {16 * 'a'}.partial" in dirotq("compare").out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "another shape"),
        ("[]", "another shape"),
        ({"images": []}, "another shape"),
        ({"bits_per_parameter": None}, "another shape"),
        ({"bits_per_parameter": float("nan")}, "another shape"),
        ({"scores": {"psnr": {}}}, "another shape"),
        ({"bytes": {"total": 0, "original": 1}}, "another shape"),
    ],
)
def test_a_report_that_cannot_be_read_is_left_out(dirotq, here, store, two, content, said):
    text = content if isinstance(content, str) else json.dumps(report(scores(41.0)) | content)
    odd = publish(store, text, rank=8)
    done = dirotq("compare")
    assert done.status == 0
    assert f"{odd} is left out" in done.out
    assert said in done.out
    assert len(table(here)) == 2


def test_a_damaged_report_is_left_out(dirotq, here, two):
    (two[0].data / "report.json").write_text("{}")
    assert "is damaged: report.json has" in dirotq("compare").out
    (two[1].data / "report.json").unlink()
    done = dirotq("compare", "--overwrite")
    assert done.status == 2
    assert "report.json is missing" in done.err


def test_an_older_report_is_compared_with_what_recipes_tell(dirotq, here, store):
    older = report(scores(41.0))
    for name in ("model", "method", "date", "verdict"):
        del older[name]
    publish(store, older)
    assert dirotq("compare").status == 0
    [row] = table(here)
    assert (row["method"], row["model"], row["verdict"]) == ("dirotq", "model without a name", "")
    assert row["date"].startswith("20")  # when it was published


def test_an_empty_store_and_names_of_nothing(dirotq, here, store, two):
    assert "no run has reached `validate` yet" in dirotq("compare", "store=nowhere").err
    for word in ("validate/ffff", "nonsense", "\0", 5000 * "x", ""):
        done = dirotq("compare", word)
        assert done.status == 2
        assert "match" in done.err
    publish_alone = store.create("pack", {"stage": {}, "inputs": {}})
    with publish_alone as draft:
        pass
    assert f"nothing was measured of {draft.artifact}" in dirotq("compare", "pack").err
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("out", "written"),
    [("table", "table.html"), ("table.html", "table.html"), ("v1.2.html", "v1.2.html")],
)
def test_names_of_the_page(dirotq, here, two, out, written):
    assert dirotq("compare", "--out", out).status == 0
    stem = written.removesuffix(".html")
    assert {p.name for p in here.iterdir()} == {written, f"{stem}.csv", f"{stem}.json"}


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("results.pdf", "doesn't end in .html"),
        (".", "is a folder"),
        ("", "is a folder"),
        ("no/where.html", "no folder that can be written to"),
        ("file/x.html", "no folder that can be written to"),
        (300 * "x", "is no name for a file"),
        ("a\0b", "is no name for a file"),
        ("taken", "taken.csv is a folder"),
    ],
)
def test_names_that_no_page_can_have(dirotq, here, two, out, said):
    (here / "file").write_text("")
    (here / "taken.csv").mkdir()
    done = dirotq("compare", "--out", out, "--overwrite")
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert sorted(p.name for p in here.iterdir()) == ["file", "taken.csv"]


def test_files_that_are_there_are_replaced_only_if_asked(dirotq, here, two):
    (here / "compare.csv").write_text("mine")
    done = dirotq("compare")
    assert done.status == 2
    assert "compare.csv is there already" in done.err
    assert (here / "compare.csv").read_text() == "mine"
    assert dirotq("compare", "--overwrite").status == 0
    assert len(table(here)) == 2


def test_fifty_runs_take_moments(dirotq, here, store):
    for index in range(50):
        publish(store, report(scores(40 + index / 10, index, count=64)), rank=8 * index)
    began = time.process_time()
    assert dirotq("compare").status == 0
    assert time.process_time() - began < 3
    assert len(json.loads((here / "compare.json").read_text())["pairs"]) == 1225
    assert (here / "compare.html").stat().st_size < 300_000
