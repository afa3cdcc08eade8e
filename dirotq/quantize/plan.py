"""The plan: how each site will be quantized, and why. ``rank`` writes it, later stages read it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from dirotq.errors import ConfigError
from dirotq.kernels.formats.fp4 import GROUPS as FP4_GROUPS
from dirotq.kernels.formats.hadamard import hadamard_block
from dirotq.kernels.spec import SHIFTED, ActScale, QuantSpec, WeightScale
from dirotq.models.family import Site
from dirotq.quantize.overrides import Override, override_of, parse_overrides

Rounding = Literal["gptq", "nearest"]
SMALLEST_GROUP = 16
"""The kernels know groups of 16 channels and their multiples."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A quantization method (conf/method): the transform and the two number formats.

    ``transform``        ``hadamard`` (Sylvester's blocks), ``regular`` (regular ones) or ``dense``
                         (the paper's rotation)
    ``protect``          keep the leading directions in 16 bits; False means rank 0 everywhere
    ``branch``           ``project``: they leave the main branch's input; ``beside``: they do not
    ``protected_bits``   of their coefficients and weights, 16 or 8
    ``smooth``           multiply the main branch's input by one factor per channel first
    ``leading``          eigenvectors kept per site, the largest rank to choose from; None for all
    ``block``            largest Hadamard block; 1 for none
    ``rounding``         ``gptq`` or ``nearest``
    ``weight_scale``     ``channel`` or ``group`` (of ``weight_group`` columns), ``nvfp4`` or
                         ``mxfp4``; ``weight_clip`` searches the scale
    ``act_bits``         4, 8 or 16; ``act_scale`` is ``token``, ``pow2``, ``rms`` or ``group``, or
                         the weights' FP4 format
    ``modulator_group``  W4A16 group of linears that see one row per image; null keeps them 16 bit
    ``overrides``        exceptions by site (dirotq/quantize/overrides.py)

    Where a group does not divide a site's channels (SANA has sites of 5600), the site takes half of
    it, or half of that, down to 16: the plan tells which (:func:`fitting_group`). Groups of an FP4
    format (16 in NVFP4, 32 in MXFP4) are the chip's: a site that they don't divide is refused.
    """

    recorded_as: ClassVar[str] = "dirotq.plan.Method"
    name: str
    transform: Literal["hadamard", "regular", "dense"]
    protect: bool
    branch: Literal["project", "beside"]
    protected_bits: Literal[8, 16]
    smooth: bool
    leading: int | None
    block: int
    rounding: Rounding
    weight_scale: WeightScale
    weight_group: int
    weight_clip: bool
    act_bits: Literal[4, 8, 16]
    act_scale: ActScale
    act_group: int
    modulator_group: int | None
    overrides: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        if self.rounding not in ("gptq", "nearest"):
            raise ConfigError(
                f"method.rounding={self.rounding!r} is unknown; use 'gptq' or 'nearest'"
            )
        if self.block < 1 or self.block & (self.block - 1):
            raise ConfigError(
                f"method.block={self.block} is not a power of two; use 1 (no Hadamard) ... 512"
            )
        if self.transform == "dense" and self.leading is not None:
            raise ConfigError(
                f"method.transform=dense rotates all channels, but method.leading={self.leading} "
                "keeps only the leading directions: set method.leading=null"
            )
        for index, override in enumerate(parse_overrides(self.overrides)):
            if override.rank and not self.protect:
                raise ConfigError(
                    f"method.overrides[{index}].rank={override.rank}: method {self.name} protects "
                    "no direction (method.protect=false); leave the rank out"
                )

    def override(self, site: Site) -> Override | None:
        """What ``overrides`` say about one site, together."""
        return override_of(parse_overrides(self.overrides), site)

    def protects(self, site: Site) -> bool:
        """Whether directions of the site's activation may stay in 16 bits."""
        return self.protect and site.kind == "block"

    def spec(self, site: Site, rank: int) -> QuantSpec | None:
        """Formats of one site that protects ``rank`` directions; None if it stays in 16 bits.

        An override's rank takes the place of ``rank``, and its activations in 8 bits one scale per
        token that of power-of-two groups, which 8 bits can't have.

        Raises ConfigError naming the site, e.g. for a group no half of which divides its channels.
        """
        modulator = site.kind == "modulator"
        group = self.modulator_group if modulator else self.weight_group
        override = self.override(site)
        if group is None or (override is not None and override.keep is not None):
            return None
        act_bits, act_scale = self.act_bits, self.act_scale
        if override is not None:
            rank = rank if override.rank is None else override.rank
            if override.act_bits is not None:
                act_bits = override.act_bits  # type: ignore[assignment]  # QuantSpec looks at it
                # Exceptions in 8 bits run on every chip: integers.
                act_scale = "token" if act_bits == 8 and act_scale in SHIFTED else act_scale
        # A dense rotation fills its last group with zero columns, so any group fits it.
        whole = self.transform == "dense" or self.weight_scale in FP4_GROUPS
        whole = whole and not modulator
        try:
            return QuantSpec(
                dim=site.dim,
                rows=site.rows,
                rank=0 if modulator or not self.protect else rank,
                transform="hadamard" if modulator else self.transform,
                block=1 if modulator else self._block(site.dim),
                branch="project" if modulator else self.branch,
                protected_bits=16 if modulator else self.protected_bits,
                smooth=self.smooth and not modulator,
                weight_bits=4,
                weight_scale="group" if modulator else self.weight_scale,
                weight_group=group if whole else fitting_group(group, site.dim),
                act_bits=16 if modulator else act_bits,
                act_scale="token" if modulator else act_scale,
                act_group=self.act_group if whole else fitting_group(self.act_group, site.dim),
            )
        except ValueError as error:
            raise ConfigError(f"site {site.name}, method {self.name}: {error}") from error

    def _block(self, dim: int) -> int:
        return hadamard_block(
            dim, self.block, "regular" if self.transform == "regular" else "sylvester"
        )


def fitting_group(group: int, channels: int) -> int:
    """The largest of ``group``, its half, quarter, ... down to 16 that divides ``channels``.

    ``group`` itself if none does, for QuantSpec to refuse.
    """
    halved = group
    while halved >= SMALLEST_GROUP:
        if channels % halved == 0:
            return halved
        if halved % 2:
            break
        halved //= 2
    return group


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One site's line of the plan."""

    site: Site
    spec: QuantSpec
    rounding: Rounding
    clip: bool
    why: str


def write_plan(path: Path, plan: Iterable[SitePlan]) -> None:
    """The plan as readable JSON, in the order of the network."""
    rows = [asdict(entry) for entry in plan]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def read_plan(path: Path) -> list[SitePlan]:
    """Inverse of :func:`write_plan`."""
    return [
        SitePlan(
            site_from_dict(row["site"]),
            QuantSpec.from_dict(row["spec"]),
            row["rounding"],
            row["clip"],
            row["why"],
        )
        for row in json.loads(path.read_text())
    ]


def site_from_dict(value: dict) -> Site:
    """A :class:`Site` from the JSON of ``dataclasses.asdict``."""
    return Site(**value | {"consumers": tuple(value["consumers"]), "rows": tuple(value["rows"])})
