"""Codes by the norm lose no more than codes that are made of q, k and v with a look at them."""

import pytest

pytest.importorskip("triton")

from dirotq.benchmarks import normed_attention


def test_errors_are_alike(capsys):
    assert normed_attention.main(["error"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    for name, errors in normed_attention.error_rows():
        assert errors["by the norm"] < min(0.06, 1.1 * errors["of q, k, v"]), name


def test_what_there_is(capsys):
    assert normed_attention.main(["speed"]) == 2
    assert "time and error" in capsys.readouterr().err
