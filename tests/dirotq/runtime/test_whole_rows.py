"""Which reductions read a row once."""

from types import SimpleNamespace

import pytest
import torch
from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

from dirotq.runtime.whole_rows import LONGEST, WholeRows, whole_rows


@pytest.fixture(autouse=True)
def graph():
    sizes = SimpleNamespace(statically_known_leq=lambda a, b: a <= b, optimization_hint=int)
    with V.set_graph_handler(SimpleNamespace(sizevars=sizes)):
        yield


def asked(numel: int, hint: ReductionHint, cooperative: bool = False) -> bool:
    features = SimpleNamespace(get_reduction_hint=lambda: hint, reduction_numel=numel, numel=4096)
    return WholeRows.should_use_persistent_reduction(features, cooperative)


@pytest.mark.parametrize(
    ("numel", "whole"), [(128, True), (1024, True), (1025, True), (LONGEST, True), (8193, False)]
)
def test_rows_of_neighbours(numel, whole):
    assert asked(numel, ReductionHint.INNER) == whole


def test_other_reductions_are_inductors_own_business():
    assert not asked(3072, ReductionHint.OUTER_TINY)
    assert not asked(3072, ReductionHint.INNER, cooperative=True)


def test_the_choices_hold_while_compiling():
    with whole_rows():
        assert isinstance(V.choices, WholeRows)
    assert type(V.choices) is InductorChoices


def test_inductor_compiles_with_them():
    norm = torch.nn.LayerNorm(2048)
    with whole_rows():
        compiled = torch._inductor.compile(torch.fx.symbolic_trace(norm), [torch.randn(3, 2048)])
    x = torch.randn(3, 2048)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), norm(x), rtol=1e-4, atol=1e-4)
