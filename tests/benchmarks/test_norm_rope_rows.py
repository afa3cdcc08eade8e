"""Rows of `norm_rope`: what is timed computes the same, on tensors a few rows long."""

import dataclasses
import functools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from dirotq.benchmarks import norm_rope_rows as rows


def small(case: rows.Queries) -> rows.Queries:
    heads, dim = 3, 16
    tokens = tuple(range(3, 3 + len(case.tokens)))
    return dataclasses.replace(case, tokens=tokens, heads=heads, dim=dim, columns=heads * dim + 8)


CASES = pytest.mark.parametrize("case", [small(case) for case in rows.CASES], ids=str)


@CASES
def test_ours_computes_what_diffusers_does(case, monkeypatch):
    given = rows.inputs(case, 0, "cpu")
    assert rows.wrong(case, given) is None
    monkeypatch.setattr(rows, "operator", lambda case, given: 1.1 * rows.torch_code(case)(given))
    assert "relative error 0.1, plain torch 0.00" in rows.wrong(case, given)


@CASES
def test_the_compiled_contestant_is_compiled_once(case):
    torch._dynamo.reset()
    counter = CompileCounter()
    plain = torch.compile(rows.torch_code(case), dynamic=False, backend=counter)
    for seed in range(3):
        given = rows.inputs(case, seed, "cpu")
        assert torch.equal(plain(given), rows.torch_code(case)(given))
    assert counter.frame_count == 1


def test_a_wrong_result_ends_it(monkeypatch):
    monkeypatch.setattr(rows, "CASES", [small(rows.CASES[0])])
    monkeypatch.setattr(rows, "inputs", functools.partial(rows.inputs, device="cpu"))
    monkeypatch.setattr(rows, "operator", lambda case, given: given.parts[0])
    monkeypatch.setattr(rows, "copies", lambda size: 1)
    with pytest.raises(RuntimeError, match=r"FLUX single 3 x 16, T = 3: relative error"):
        list(rows.rows(1e9))


def test_traffic():
    case = small(rows.CASES[0])
    given = rows.inputs(case, 0, "cpu")
    assert rows.traffic(given) == 4 * 3 * 3 * 16 + 2 * 4 * 3 * 16
