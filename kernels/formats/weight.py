"""The number format of weights: what a code is, and what its scale covers."""

from dataclasses import dataclass
from typing import Literal

from .fp4 import GROUPS as FP4_GROUPS

Element = Literal["int4", "lm4", "e2m1"]
"""What a 4-bit code is: an integer in [-7, 7], one of 16 levels (lm4.py), or a float (fp4.py)."""
Granularity = Literal["channel", "group"]
ScaleFormat = Literal["bf16", "e4m3", "e8m0"]

RECORDED: dict[str, tuple[Element, Granularity, ScaleFormat]] = {
    "channel": ("int4", "channel", "bf16"),
    "group": ("int4", "group", "bf16"),
    "lm4_channel": ("lm4", "channel", "bf16"),
    "lm4_group": ("lm4", "group", "bf16"),
    "nvfp4": ("e2m1", "group", "e4m3"),
    "mxfp4": ("e2m1", "group", "e8m0"),
}
"""``weight_scale`` of files and recipes: element, granularity and scale in one word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How weights are rounded to 4 bits (docs/method.md M4). Those that exist: conf/weight_format.

    ``element``      a code: ``int4``, levels ``lm4``, or floats ``e2m1``
    ``granularity``  what shares a scale: an output's whole row (``channel``) or a ``group`` of it
    ``scale``        a scale's own format
    ``group``        columns of a group; recorded also where there are no groups

    Raises ValueError for facts that don't go together.
    """

    element: Element
    granularity: Granularity
    scale: ScaleFormat
    group: int

    def __post_init__(self) -> None:
        if self._facts not in RECORDED.values():
            raise ValueError(
                f"no format of {self.element} weights has scales in {self.scale} per "
                f"{self.granularity}: choose one of the files in conf/weight_format"
            )
        if self.element == "e2m1" and self.group != FP4_GROUPS[self.name]:
            raise ValueError(
                f"{self.name} has groups of {FP4_GROUPS[self.name]}, not {self.group}: set the "
                f"weights' group to {FP4_GROUPS[self.name]}"
            )

    @property
    def name(self) -> str:
        """The format in the word that files have for it (:data:`RECORDED`)."""
        return next(name for name, facts in RECORDED.items() if facts == self._facts)

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None for all of a row."""
        return None if self.granularity == "channel" else self.group

    @property
    def _facts(self) -> tuple[Element, Granularity, ScaleFormat]:
        return self.element, self.granularity, self.scale


def recorded_format(name: str, group: int) -> WeightFormat:
    """Return the format that a file records as ``weight_scale`` and ``weight_group``.

    Raises ValueError for one that there is not.
    """
    if name not in RECORDED:
        known = list(map(repr, RECORDED))
        raise ValueError(f"weight scale {name!r} is not {', '.join(known[:-1])} or {known[-1]}")
    element, granularity, scale = RECORDED[name]
    return WeightFormat(element=element, granularity=granularity, scale=scale, group=group)
