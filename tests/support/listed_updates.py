"""A source of a packed linear's updates that a test sets by hand."""

from dataclasses import dataclass

from dirotq.kernels.directions import Part


@dataclass(eq=False)
class Adapter:
    """``found`` is what it updates the linear with: replace its entries."""

    found: list[Part]

    def parts(self) -> list[Part]:
        return self.found

    def state(self) -> list[int]:
        return list(map(id, self.found))
