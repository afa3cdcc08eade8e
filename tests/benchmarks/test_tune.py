"""`make tune`: the table that it writes, and the one that is shipped."""

import json

import pytest
import torch

from dirotq.benchmarks import tune
from dirotq.benchmarks.tune import dumped
from dirotq.kernels.humming_linear import library
from dirotq.kernels.measured import TABLE
from dirotq.kernels.plan import candidates_for, name_of
from dirotq.tuning import session
from dirotq.tuning.random_linear import FORMATS, spec_for
from dirotq.tuning.timing import Timing


def problems(table):
    """What is wrong with a table of plans."""
    found = []
    for chip, kinds in table.items():
        for kind, rows in kinds.items():
            if kind not in FORMATS:
                found.append(f"{kind}: no such format")
                continue
            for row in rows:
                if set(row) != {"m", "n", "k", "plan", "us"}:
                    found.append(f"{row}: fields")
                    continue
                spec = spec_for(kind, row["k"], row["n"])
                known = candidates_for(int(chip), row["m"], row["n"], spec, torch.bfloat16)
                if row["plan"] not in map(name_of, known):
                    found.append(f"{row}: no such plan on sm_{chip}")
                if not row["us"] > 0:
                    found.append(f"{row}: time")
    return found


def test_the_table_that_is_shipped_holds_plans_that_exist(monkeypatch):
    monkeypatch.setattr(library, "missing", lambda: None)  # it has rows for who installs Humming
    table = json.loads(TABLE.read_text())
    assert problems(table) == []
    assert dumped(table) == TABLE.read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"plan": "scaled"}, "no such plan"),
        ({"us": 0}, "time"),
        ({"ms": 1}, "fields"),
    ],
)
def test_problems_are_noticed(change, said):
    row = {"m": 1, "n": 9216, "k": 3072, "plan": "scaled_mm", "us": 9.0} | change
    found = problems({"90": {"w4a4": [row]}})
    assert [said in p for p in found] == [True] * (said is not None)
    assert problems({"90": {"w3a3": [row]}}) == ["w3a3: no such format"]
    assert problems({"80": {"w4a4": [row | {"us": 9.0}]}})  # no FP8 on sm_80


def test_what_was_timed_takes_the_place_of_old_rows(tmp_path, monkeypatch, capsys):
    def by(shape, candidates, failed):
        return [(p, Timing(i, i, i)) for i, p in enumerate(candidates, start=1)]

    file = tmp_path / "plans.json"
    old = {"m": 1, "n": 9216, "k": 3072, "plan": "scaled_mm", "us": 5.0}
    file.write_text(dumped({"80": {"w4a8": []}, "90": {"w4a16": [], "w4a4": [old]}}))
    monkeypatch.setattr(tune, "usable_gpu", lambda: (90, "NVIDIA H200"))
    monkeypatch.setattr(tune, "compile_all", lambda *_: None)
    real = session.measure
    monkeypatch.setattr(session, "measure", lambda *a, **k: real(*a, **k, by=by))
    words = ["--formats", "w4a4", "--m", "4608", "--k", "3072", "--n", "9216", "--into", str(file)]
    assert tune.main(words) == 0
    after = json.loads(file.read_text())
    assert problems(after) == []
    assert after["80"] == {"w4a8": []} and after["90"]["w4a16"] == []
    assert after["90"]["w4a4"][0] == old
    assert after["90"]["w4a4"][1]["plan"] == "scaled_mm"
    assert "[1/1] w4a4 3072 -> 9216, M = 4608: 1.0 us scaled_mm" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "measures on an NVIDIA GPU" in capsys.readouterr().err
