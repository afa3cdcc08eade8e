"""The number format of activations: what a code is, and what its scale follows and covers."""

from dataclasses import dataclass
from typing import Literal, get_args

from .fp4 import GROUPS as FP4_GROUPS

Element = Literal["int4", "lzs", "int8", "e4m3", "e2m1", "bf16"]
Statistic = Literal["absmax", "rms"]
Granularity = Literal["token", "group"]
ScaleFormat = Literal["float32", "e4m3", "e8m0"]

BITS = {"int4": 4, "lzs": 4, "int8": 8, "e4m3": 8, "e2m1": 4, "bf16": 16}
RECORDED: dict[str, tuple[Statistic, Granularity, bool, ScaleFormat]] = {
    "token": ("absmax", "token", False, "float32"),
    "pow2": ("absmax", "token", True, "float32"),
    "rms": ("rms", "token", True, "float32"),
    "group": ("absmax", "group", False, "float32"),
    "lzs": ("absmax", "token", True, "float32"),
    "nvfp4": ("absmax", "group", False, "e4m3"),
    "mxfp4": ("absmax", "group", False, "e8m0"),
}
"""``act_scale`` of files and recipes: statistic, granularity, shifted and scale in one word. The
scales of ``lzs`` are those of ``pow2``, its element is its own."""

POW2_LEVELS = 4
"""A group's scale is 2^0 ... 2^-4 of its row's: q 2^(e+4) is exact in INT8 and in FP8-E4M3."""

FLOAT_LEVELS = 6
"""8-bit floats end at 448 = 7 * 2^6: they have the units of seven steps of 2^6."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActFormat:
    """How a linear's input is rounded (docs/method.md M4). Those that exist: conf/act_format.

    ``element``      a code: ``int4``, ``int8``, floats ``e4m3`` (8 bits) or ``e2m1`` (4 bits);
                     ``lzs``: an 8-bit integer's sign and the three bits that follow the zeros with
                     which all of the group begin; or ``bf16``: not rounded, the rest means nothing
    ``statistic``    what a scale follows: the largest value (``absmax``) or the root mean square
    ``granularity``  what shares a scale: a row (``token``) or a ``group`` of a row's channels
    ``shifted``      codes carry a power of two per group, at most 1, below the row's scale
    ``scale``        a scale's own format
    ``group``        channels of a group; recorded also where there are no groups

    Raises ValueError for facts that don't go together.
    """

    element: Element
    statistic: Statistic
    granularity: Granularity
    shifted: bool
    scale: ScaleFormat
    group: int

    def __post_init__(self) -> None:
        if self.element not in BITS:
            raise ValueError(f"element {self.element!r} is not {_one_of(get_args(Element))}")
        if self.element == "int8" and self.shifted:
            raise ValueError(
                "8-bit activations with power-of-two groups leave INT8: use scale 'token' or "
                "'group', or 'rms' for 8-bit floats (act_format=int8_token, int8_group or fp8)"
            )
        if self.element == "e4m3":
            known = self._facts == ("rms", "token", False, "float32")
        elif self.element == "lzs":
            known = self._facts == RECORDED["lzs"]
        else:
            known = self._facts in RECORDED.values()
        if not known:
            raise ValueError(
                f"no format of {self.element} activations has {self.statistic} scales in "
                f"{self.scale} per {self.granularity}, {'' if self.shifted else 'not '}shifted: "
                "choose one of the files in conf/act_format"
            )
        four = self.scale != "float32"
        if four and self.element != "e2m1":
            raise ValueError(f"{self.name} activations have 4 bits, not {self.bits}")
        if self.element == "e2m1" and not four:
            raise ValueError("e2m1 activations have scales in e4m3 (NVFP4) or e8m0 (MXFP4)")
        if four and self.group != FP4_GROUPS[self.name]:
            raise ValueError(
                f"{self.name} has groups of {FP4_GROUPS[self.name]}, not {self.group}: set the "
                f"activations' group to {FP4_GROUPS[self.name]}"
            )

    @property
    def bits(self) -> int:
        return BITS[self.element]

    @property
    def name(self) -> str:
        """The scale in the word that files have for it (:data:`RECORDED`)."""
        if self.element == "e4m3":
            return "rms"
        if self.element == "lzs":
            return "lzs"
        return next(name for name, facts in RECORDED.items() if facts == self._facts)

    @property
    def group_size(self) -> int | None:
        """Channels that a scale or a power of two is for; None for all of a row."""
        floats = self.element in ("e4m3", "bf16")
        whole = floats or (self.granularity == "token" and not self.shifted)
        return None if whole else self.group

    @property
    def largest(self) -> int:
        """Largest code, in steps of the row's scale."""
        return 7 if self.element == "e4m3" else 2 ** (self.bits - 1) - 1

    @property
    def levels(self) -> int:
        """Powers of two that codes carry below a step."""
        if self.element == "e4m3":
            return FLOAT_LEVELS
        return POW2_LEVELS if self.shifted else 0

    def in_bits(self, bits: int) -> "ActFormat":
        """Return the same scales with codes of ``bits``; in 8, integers with one scale per row in
        place of powers of two, which run on every chip.

        Raises ValueError for FP4, which has 4 bits.
        """
        row = bits == 8 and (self.shifted or self.element == "e4m3")
        return recorded_format(bits, "token" if row else self.name, self.group)

    @property
    def _facts(self) -> tuple[Statistic, Granularity, bool, ScaleFormat]:
        return self.statistic, self.granularity, self.shifted, self.scale


def recorded_format(bits: int, name: str, group: int) -> ActFormat:
    """Return the format that a file records as ``act_bits``, ``act_scale`` and ``act_group``.

    Raises ValueError for a scale that there is not, or that codes of ``bits`` can't have.
    """
    if name not in RECORDED:
        raise ValueError(f"activation scale {name!r} is not {_one_of(tuple(RECORDED))}")
    statistic, granularity, shifted, scale = RECORDED[name]
    element: Element = "e2m1" if name in FP4_GROUPS else "lzs" if name == "lzs" else "int4"
    if bits != 4:
        element = "bf16" if bits == 16 else "e4m3" if statistic == "rms" else "int8"
    return ActFormat(
        element=element,
        statistic=statistic,
        granularity=granularity,
        shifted=shifted and element != "e4m3",
        scale=scale,
        group=group,
    )


def _one_of(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"
