"""Norms of whole rows: Inductor reads a row once and keeps it in registers.

By itself it does so up to 1024 numbers and reads longer rows twice, which is what a norm over the
channels of a large network costs then: 50 us in FLUX.1's single blocks, where 21 are enough. Its
``multi_kernel`` measures both ways, and takes the host half a millisecond for every launch without
a CUDA graph.
"""

from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.runtime.hints import ReductionHint
from torch._inductor.virtualized import V

LONGEST = 8192
"""Numbers of a row that the registers of a program hold."""


class WholeRows(InductorChoices):
    """Inductor's heuristics, but for rows of up to ``LONGEST`` numbers that lie side by side."""

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        """Tell whether a reduction takes its row at once."""
        usual = InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)
        if usual or cooperative_reduction:
            return bool(usual)
        if features.get_reduction_hint() != ReductionHint.INNER:
            return False
        return bool(V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST))


def whole_rows() -> Any:
    """Return a context in which Inductor compiles with :class:`WholeRows`."""
    return V.set_choices_handler(WholeRows())
