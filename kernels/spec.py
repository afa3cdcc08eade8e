"""How one site is quantized: what the plan decides, the config stores and the runtime obeys."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .formats.fp4 import GROUPS as FP4_GROUPS
from .formats.hadamard import Kind, hadamard_block

POW2_LEVELS = 4
"""A group's scale is 2^0 ... 2^-4 of its row's: q 2^(e+4) is exact in INT8 and in FP8-E4M3."""

SHIFTED = ("pow2", "rms")
"""Activation scales of which 4-bit codes carry powers of two below the row's."""

FLOAT_LEVELS = 6
"""8-bit floats end at 448 = 7 * 2^6: they have the units of seven steps of 2^6."""

WeightScale = Literal["channel", "group", "nvfp4", "mxfp4"]
ActScale = Literal["token", "pow2", "rms", "group", "nvfp4", "mxfp4"]
Element = Literal["int4", "e2m1"]
"""What a 4-bit code is: an integer in [-7, 7], or a float in halves (kernels/formats/fp4.py)."""


ADDED = {"branch": "project", "smooth": False, "protected_bits": 16}
"""Fields that came with format 2, and what they are in folders without them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """Shapes and number formats of the linears that read one site (docs/method.md).

    ``dim`` channels come in, ``rows`` outputs per consumer go out, ``rank`` directions are
    protected in 16 bits, and the main branch is ``width`` codes wide.

    Folders packed before a field existed lack it: new fields have defaults.
    """

    dim: int
    rows: tuple[int, ...]
    rank: int
    transform: Literal["hadamard", "regular", "dense"]
    block: int
    """Of the Hadamard matrices, Sylvester's or regular; 1 is the identity. Unused by ``dense``."""
    weight_bits: Literal[4]
    weight_scale: WeightScale
    weight_group: int
    act_bits: Literal[4, 8, 16]
    act_scale: ActScale
    act_group: int
    branch: Literal["project", "beside"] = "project"
    """``project`` takes the protected directions out of the main branch's input, ``beside`` leaves
    it whole, and what the protected branch computes is missing from the weights only (M3)."""
    smooth: bool = False
    """The main branch's input is multiplied by one number per channel first."""
    protected_bits: Literal[8, 16] = 16
    """Of the protected branch's coefficients and weights."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> list[str]:
        found = []
        if not 0 <= self.rank <= self.dim:
            found.append(f"rank {self.rank} is not in 0 ... {self.dim} (the site's channels)")
        if self.transform not in ("hadamard", "regular", "dense"):
            found.append(f"transform {self.transform!r} is not 'hadamard', 'regular' or 'dense'")
        if self.transform == "dense" and self.rank == self.dim:
            found.append(
                f"rank {self.rank} leaves no channel of {self.dim} for the dense rotation; use a "
                "lower rank"
            )
        if self.transform != "dense":
            power = "four" if self.kind == "regular" else "two"
            if self.block != hadamard_block(self.dim, self.block, self.kind):
                found.append(
                    f"Hadamard block {self.block} is not a power of {power} dividing {self.dim} "
                    "channels"
                )
        if self.branch not in ("project", "beside"):
            found.append(f"branch {self.branch!r} is neither 'project' nor 'beside'")
        if self.branch == "beside" and self.transform == "dense":
            found.append("a dense rotation takes its directions out of the input: branch 'project'")
        if self.smooth and (self.transform == "dense" or (self.rank and self.branch == "project")):
            found.append(
                "smoothing goes with Hadamard transforms, and with protected directions only in "
                "branch 'beside'"
            )
        if self.protected_bits not in (8, 16):
            found.append(f"protected branches take 8 or 16 bits, not {self.protected_bits}")
        if self.weight_bits != 4 or self.act_bits not in (4, 8, 16):
            found.append(
                f"W{self.weight_bits}A{self.act_bits} is not supported; weights take 4 bits, "
                "activations 4, 8 or 16"
            )
        for what, scale, known in (
            ("weight", self.weight_scale, get_args(WeightScale)),
            ("activation", self.act_scale, get_args(ActScale)),
        ):
            if scale not in known:
                found.append(f"{what} scale {scale!r} is not {_one_of(known)}")
        found += self._fp4_problems()
        if self.act_bits == 8 and self.act_scale == "pow2":
            found.append(
                "8-bit activations with power-of-two groups leave INT8: use scale 'token' or "
                "'group', or 'rms' for 8-bit floats"
            )
        if self.width % 2:
            found.append(f"the main branch is {self.width} codes wide; two codes share a byte")
        for what, group in (
            ("weight", self.weight_group_size),
            ("activation", self.act_group_size),
        ):
            if group < 1 or self.width % group:
                found.append(
                    f"{what} group {group} does not divide the {self.width} channels of the main "
                    f"branch; use one of {_divisors(self.width)}"
                )
        return found

    def _fp4_problems(self) -> list[str]:
        """FP4 formats are what a chip multiplies: fixed groups, the same format on both sides."""
        found = []
        weight, act = self.weight_scale in FP4_GROUPS, self.act_scale in FP4_GROUPS
        if act and self.act_bits != 4:
            found.append(f"{self.act_scale} activations have 4 bits, not {self.act_bits}")
        if self.act_bits != 16 and (weight or act) and self.weight_scale != self.act_scale:
            found.append(
                f"weights in {self.weight_scale!r} and activations in {self.act_scale!r} share no "
                "matrix unit: use one FP4 format for both, or 16-bit activations"
            )
        for side in ("weight", "act"):
            scale, group = getattr(self, f"{side}_scale"), getattr(self, f"{side}_group")
            if scale in FP4_GROUPS and group != FP4_GROUPS[scale]:
                found.append(
                    f"{scale} has groups of {FP4_GROUPS[scale]}, not {group}: set {side}_group to "
                    f"{FP4_GROUPS[scale]}"
                )
        return found

    @property
    def format(self) -> str:
        """Short name for tables: W4A4, W4A8, W4A4 NVFP4, ..."""
        fp4 = f" {self.weight_scale.upper()}" if self.weight_element == "e2m1" else ""
        return f"W{self.weight_bits}A{self.act_bits}{fp4}"

    @property
    def weight_element(self) -> Element:
        return "e2m1" if self.weight_scale in FP4_GROUPS else "int4"

    @property
    def kind(self) -> Kind:
        """Of the Hadamard matrix."""
        return "regular" if self.transform == "regular" else "sylvester"

    @property
    def width(self) -> int:
        """Codes per row of the main branch (K)."""
        if self.transform != "dense":
            return self.dim
        # A dense rotation keeps d - r channels; zero columns fill its last group (2: one byte).
        step = math.lcm(2, *(g for g in (self._group("weight"), self._group("act")) if g))
        return -(-(self.dim - self.rank) // step) * step

    @property
    def outputs(self) -> int:
        return sum(self.rows)

    @property
    def weight_group_size(self) -> int:
        """Columns that share a weight scale: the group, or the whole row."""
        group = self._group("weight")
        return self.width if group is None else group

    @property
    def act_group_size(self) -> int:
        """Channels that share an activation scale: the group, or the whole row."""
        group = self._group("act")
        return self.width if group is None else group

    @property
    def act_floats(self) -> bool:
        """Whether activations' codes are FP8-E4M3 numbers, and not integers."""
        return self.act_bits == 8 and self.act_scale == "rms"

    @property
    def act_max(self) -> int:
        """Largest code of an activation, in steps of the row's scale."""
        return 7 if self.act_floats else 2 ** (self.act_bits - 1) - 1

    @property
    def act_levels(self) -> int:
        """Powers of two that codes of activations carry below a step."""
        if self.act_floats:
            return FLOAT_LEVELS
        return POW2_LEVELS if self.act_scale in SHIFTED else 0

    def _group(self, side: str) -> int | None:
        whole_row = getattr(self, f"{side}_scale") in ("channel", "token")
        whole_row = whole_row or (side == "act" and self.act_floats)
        if whole_row or (side == "act" and self.act_bits == 16):
            return None
        return int(getattr(self, f"{side}_group"))

    @property
    def since(self) -> int:
        """Oldest format of packed folders (dirotq/quantizer.py) whose readers know this spec."""
        new = self.weight_element == "e2m1" or self.transform == "regular"
        new = new or self.act_scale == "rms"
        return 2 if new or self.to_dict().keys() & ADDED.keys() else 1

    @property
    def has_tail(self) -> bool:
        """Whether the protected branch and the bias may be FP8 columns of the product (Eq. 9)."""
        whole = self.rank == 0 or (self.branch == "project" and self.protected_bits == 16)
        plain = self.transform != "regular" and not self.smooth
        return self.weight_scale == "channel" and plain and whole

    def to_dict(self) -> dict[str, Any]:
        """As JSON; a field that format 1 lacks is left out where it has its default."""
        fields = dataclasses.asdict(self) | {"rows": list(self.rows)}
        return {k: v for k, v in fields.items() if k not in ADDED or v != ADDED[k]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "QuantSpec":
        return cls(**value)


def _one_of(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"


def _divisors(width: int) -> list[int]:
    return [g for g in (16, 32, 48, 64, 80, 96, 128, 256) if width % g == 0]
