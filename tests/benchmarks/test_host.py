"""`make bench-host`: its parts run, and its table says what was asked."""

import dataclasses

import torch

from dirotq.benchmarks import host
from dirotq.benchmarks.published import append, read

ROW = host.Row(
    case="small 8 -> 8, M = 1", what=host.WHOLE, us_p20=29.0, us_p50=30.0, us_p80=31.0, reach=60.0,
    stretch=30.0, gpu="GPU", git="0" * 40,
)  # fmt: skip


def row(us: float, **more) -> host.Row:
    return dataclasses.replace(ROW, us_p50=us, **more)


def test_a_time_is_judged_at_the_bounds():
    assert [host.verdict(row(us)) for us in (30.0, 30.1, 60.0, 60.1)] == [
        "goal", "reached", "reached", "**missed**",
    ]  # fmt: skip
    assert host.verdict(row(99.0, reach=None, stretch=None)) == ""


def test_rows_survive_the_file_and_make_a_table(tmp_path):
    rows = [row(45.25), row(8.5, what="nn.Linear, bf16", reach=None, stretch=None)]
    append(tmp_path / "host.csv", rows)
    assert read(tmp_path / "host.csv", host.Row) == rows
    text = host.table(rows)
    assert "### Host time: small 8 -> 8, M = 1" in text
    assert "| packed linear | 45.2 [29.0, 31.0] | 60 / 30 | reached |" in text
    assert "| nn.Linear, bf16 | 8.5 [29.0, 31.0] |  |  |" in text
    assert text.endswith("percentile.\n")


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert host.main([]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err
