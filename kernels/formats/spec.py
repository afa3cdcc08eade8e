"""How one site is quantized: what the plan decides, the config stores and the runtime obeys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import activation, weight
from .activation import ActFormat
from .transform import PROJECT, LowRank, Transform
from .weight import WeightFormat

ADDED = {"branch": "project", "smooth": False, "protected_bits": 16}
"""Fields that came with format 2 of packed folders, and what they are in folders without them."""

FIELDS = {
    "dim", "rows", "rank", "transform", "block", "weight_bits", "weight_scale", "weight_group",
    "act_bits", "act_scale", "act_group", *ADDED,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantSpec:
    """Shapes and number formats of the linears that read one site (docs/method.md).

    ``in_features`` come in, ``out_features`` of each linear go out, ``rank`` directions are
    protected in 16 bits, and the main branch is ``width`` codes wide.

    Files hold it flat (:meth:`to_dict`), in the words of the first versions.

    Raises ValueError for parts that don't go together.
    """

    in_features: int
    out_features: tuple[int, ...]
    rank: int
    transform: Transform
    branch: LowRank
    weights: WeightFormat
    activations: ActFormat

    def __post_init__(self) -> None:
        object.__setattr__(self, "out_features", tuple(self.out_features))
        self._check_shape()
        self._check_parts()
        self._check_groups()

    @property
    def format(self) -> str:
        """Short name for tables: W4A4, W4A8, W4A4 NVFP4, ..."""
        weights = self.weights
        kind = {"int4": "", "lm4": " LM4"}.get(weights.element, f" {weights.name.upper()}")
        return f"W4A{self.activations.bits}{kind}"

    @property
    def width(self) -> int:
        """Codes per row of the main branch (K)."""
        if self.transform.kind != "dense":
            return self.in_features
        # A dense rotation keeps d - r channels; zero columns fill its last group (2: one byte).
        sides = (self.weights.group_size, self.activations.group_size)
        step = math.lcm(2, *(group for group in sides if group))
        return -(-(self.in_features - self.rank) // step) * step

    @property
    def outputs(self) -> int:
        return sum(self.out_features)

    @property
    def weight_group_size(self) -> int:
        """Columns that share a weight scale: the group, or the whole row."""
        group = self.weights.group_size
        return self.width if group is None else group

    @property
    def act_group_size(self) -> int:
        """Channels that share an activation scale: the group, or the whole row."""
        group = self.activations.group_size
        return self.width if group is None else group

    @property
    def since(self) -> int:
        """Oldest format of packed folders (dirotq/quantizer.py) whose readers know this spec."""
        if self.weights.element == "lm4" or self.activations.element == "lzs":
            return 3
        new = self.weights.element == "e2m1" or self.transform.kind == "regular"
        new = new or self.activations.statistic == "rms"
        return 2 if new or self.to_dict().keys() & ADDED.keys() else 1

    @property
    def can_append(self) -> bool:
        """Whether low-rank branch and bias may be FP8 columns of the product (Eq. 9)."""
        whole = self.rank == 0 or self.branch == PROJECT
        plain = self.transform.kind != "regular" and not self.transform.smooth
        channels = self.weights.granularity == "channel"
        return channels and plain and whole

    def recorded(self) -> dict[str, Any]:
        """Return every field flat, as plan.json has it."""
        shape = {"dim": self.in_features, "rows": list(self.out_features), "rank": self.rank}
        return shape | flat(self.transform, self.branch, self.weights, self.activations)

    def to_dict(self) -> dict[str, Any]:
        """Return it flat for packed folders: what format 1 lacks is left out at its default."""
        return {k: v for k, v in self.recorded().items() if k not in ADDED or v != ADDED[k]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "QuantSpec":
        """Undo :meth:`to_dict` and :meth:`recorded`.

        Raises TypeError for a field that is missing or unknown, ValueError for a wrong value.
        """
        fields: dict[str, Any] = ADDED | dict(value)
        if odd := fields.keys() ^ FIELDS:
            raise TypeError(f"fields that are missing or unknown: {', '.join(sorted(odd))}")
        if fields["weight_bits"] != 4 or fields["act_bits"] not in (4, 8, 16):
            raise ValueError(
                f"W{fields['weight_bits']}A{fields['act_bits']} is not supported; weights take 4 "
                "bits, activations 4, 8 or 16"
            )
        smooth, block = fields["smooth"], fields["block"]
        return cls(
            in_features=fields["dim"],
            out_features=fields["rows"],
            rank=fields["rank"],
            transform=Transform(kind=fields["transform"], block=block, smooth=smooth),
            branch=LowRank(kind=fields["branch"], bits=fields["protected_bits"]),
            weights=weight.recorded_format(fields["weight_scale"], fields["weight_group"]),
            activations=activation.recorded_format(
                fields["act_bits"], fields["act_scale"], fields["act_group"]
            ),
        )

    def _check_shape(self) -> None:
        dim, block = self.in_features, self.transform.block
        if not 0 <= self.rank <= dim:
            raise ValueError(f"rank {self.rank} is not in 0 ... {dim} (the site's channels)")
        if self.transform.kind == "dense":
            if self.rank == dim:
                raise ValueError(
                    f"rank {self.rank} leaves no channel of {dim} for the dense rotation; use a "
                    "lower rank"
                )
        elif block != self.transform.largest_block(dim):
            power = "four" if self.transform.matrix == "regular" else "two"
            raise ValueError(
                f"Hadamard block {block} is not a power of {power} dividing {dim} channels"
            )

    def _check_parts(self) -> None:
        projects = self.branch.kind == "project"
        if not projects and self.transform.kind == "dense":
            raise ValueError(
                "a dense rotation takes its directions out of the input: branch 'project'"
            )
        if self.transform.smooth and self.rank and projects:
            raise ValueError(
                "smoothing goes with Hadamard transforms, and with protected directions only in "
                "branch 'beside'"
            )
        # FP4 is what a chip multiplies: the same format on both sides.
        weights, acts = self.weights, self.activations
        either = "e2m1" in (weights.element, acts.element)
        if acts.bits != 16 and either and weights.name != acts.name:
            raise ValueError(
                f"weights in {weights.name!r} and activations in {acts.name!r} share no matrix "
                "unit: use one FP4 format for both, or 16-bit activations"
            )

    def _check_groups(self) -> None:
        width = self.width
        if width % 2:
            raise ValueError(f"the main branch is {width} codes wide; two codes share a byte")
        sizes = {"weight": self.weight_group_size, "activation": self.act_group_size}
        for what, group in sizes.items():
            if group < 1 or width % group:
                divisors = [g for g in (16, 32, 48, 64, 80, 96, 128, 256) if width % g == 0]
                raise ValueError(
                    f"{what} group {group} does not divide the {width} channels of the main "
                    f"branch; use one of {divisors}"
                )


def flat(
    transform: Transform, branch: LowRank, weights: WeightFormat, activations: ActFormat
) -> dict[str, Any]:
    """Return the parts of a spec or a method in the words of files and recipes."""
    return {
        "transform": transform.kind,
        "block": transform.block,
        "weight_bits": 4,
        "weight_scale": weights.name,
        "weight_group": weights.group,
        "act_bits": activations.bits,
        "act_scale": activations.name,
        "act_group": activations.group,
        "branch": branch.kind,
        "smooth": transform.smooth,
        "protected_bits": branch.bits,
    }
