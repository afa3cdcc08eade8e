"""The plan: how each site will be quantized, and why. ``rank`` writes it, later stages read it."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from dirotq.errors import ConfigError
from dirotq.kernels.formats import weight
from dirotq.kernels.formats.activation import ActFormat, recorded_format
from dirotq.kernels.formats.spec import QuantSpec, flat
from dirotq.kernels.formats.transform import NO_TRANSFORM, PROJECT, LowRank, Transform
from dirotq.kernels.formats.weight import WeightFormat
from dirotq.models.family import Site
from dirotq.quantize.overrides import Override, override_of, parse_overrides

Rounding = Literal["gptq", "nearest"]
SMALLEST_GROUP = 16
"""The kernels know groups of 16 channels and their multiples."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A quantization method (conf/method): what it does to inputs and weights, and their formats.

    ``transform``        conf/transform; ``block`` is the largest Hadamard block
    ``branch``           conf/branch: how the low-rank branch is computed; None for no branch
    ``weights``          conf/weight_format
    ``weight_clip``      search the weights' scales below their largest value
    ``activations``      conf/act_format
    ``leading``          eigenvectors kept per site, the largest rank to choose from; None for all
    ``rounding``         ``gptq`` or ``nearest``
    ``modulator_group``  W4A16 group of linears that see one row per image; null keeps them 16 bit
    ``overrides``        exceptions by site (dirotq/quantize/overrides.py)
    ``sensitive``        what ``rank.sensitive`` is by default

    Where a group does not divide a site's channels (SANA has sites of 5600), the site takes half of
    it, or half of that, down to 16: the plan tells which (:func:`fitting_group`). Groups of an FP4
    format (16 in NVFP4, 32 in MXFP4) are the chip's: a site that they don't divide is refused.
    """

    moved: ClassVar[Mapping[str, str]] = {
        "protect": "method.branch=null, which protects nothing",
        "protected_bits": "branch.bits=8",
        "smooth": "transform.smooth=true",
        "block": "transform.block=16",
        "weight_scale": "weight_format=int4_channel, or another of conf/weight_format",
        "weight_group": "weight_format.group=128",
        "act_bits": "act_format=int8_token, or another of conf/act_format",
        "act_scale": "act_format=int4_token, or another of conf/act_format",
        "act_group": "act_format.group=64",
    }
    """Settings that have gone elsewhere, and how they are spelled now."""

    name: str
    transform: Transform
    branch: LowRank | None
    weights: WeightFormat
    weight_clip: bool
    activations: ActFormat
    leading: int | None
    rounding: Rounding
    modulator_group: int | None
    overrides: Sequence[Mapping[str, Any]]
    sensitive: str | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.rounding not in ("gptq", "nearest"):
            raise ConfigError(
                f"method.rounding={self.rounding!r} is unknown; use 'gptq' or 'nearest'"
            )
        if self.transform.kind == "dense" and self.leading is not None:
            raise ConfigError(
                f"transform=dense rotates all channels, but method.leading={self.leading} "
                "keeps only the leading directions: set method.leading=null"
            )
        for index, override in enumerate(parse_overrides(self.overrides)):
            if override.rank and self.branch is None:
                raise ConfigError(
                    f"method.overrides[{index}].rank={override.rank}: method {self.name} protects "
                    "no direction (method.branch=null); leave the rank out"
                )

    def override(self, site: Site) -> Override | None:
        """Return what ``overrides`` say about one site, together."""
        return override_of(parse_overrides(self.overrides), site)

    def protects(self, site: Site) -> bool:
        """Whether directions of the site's activation may stay in 16 bits."""
        return self.branch is not None and site.kind == "block"

    def spec(self, site: Site, rank: int) -> QuantSpec | None:
        """Return formats of one site that protects ``rank`` directions; None if it is ignored.

        An override's rank takes the place of ``rank``, and its activations in 8 bits one scale per
        token that of power-of-two groups, which 8 bits can't have.

        Raises ConfigError naming the site, e.g. for a group no half of which divides its channels.
        """
        override = self.override(site)
        if override is not None and override.keep is not None:
            return None
        try:
            if site.kind == "modulator":
                return self._modulator(site)
            return self._block(site, rank, override)
        except ValueError as error:
            raise ConfigError(f"site {site.name}, method {self.name}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """Return the recipe: flat, as the first versions had it, whose stores go on counting."""
        parts = flat(self.transform, self.branch or PROJECT, self.weights, self.activations)
        del parts["weight_bits"]
        return parts | {
            "class": "dirotq.plan.Method",
            "name": self.name,
            "protect": self.branch is not None,
            "leading": self.leading,
            "rounding": self.rounding,
            "weight_clip": self.weight_clip,
            "modulator_group": self.modulator_group,
            "overrides": self.overrides,
        }

    def _block(self, site: Site, rank: int, override: Override | None) -> QuantSpec:
        weights, acts = self.weights, self.activations
        if override is not None:
            rank = rank if override.rank is None else override.rank
            acts = acts if override.act_bits is None else acts.in_bits(override.act_bits)
        # A dense rotation fills its last group with zero columns, so any group fits it; those of an
        # FP4 format are fixed.
        if self.transform.kind != "dense" and weights.element != "e2m1":
            weights = replace(weights, group=fitting_group(weights.group, site.in_features))
            acts = replace(acts, group=fitting_group(acts.group, site.in_features))
        return QuantSpec(
            in_features=site.in_features,
            out_features=site.out_features,
            rank=0 if self.branch is None else rank,
            transform=replace(self.transform, block=self.transform.largest_block(site.in_features)),
            branch=self.branch or PROJECT,
            weights=weights,
            activations=acts,
        )

    def _modulator(self, site: Site) -> QuantSpec | None:
        """One row per image: 16-bit activations, no transform, nothing protected."""
        if self.modulator_group is None:
            return None
        return QuantSpec(
            in_features=site.in_features,
            out_features=site.out_features,
            rank=0,
            transform=NO_TRANSFORM,
            branch=PROJECT,
            weights=weight.recorded_format(
                "lm4_group" if self.weights.element == "lm4" else "group",
                fitting_group(self.modulator_group, site.in_features),
            ),
            activations=recorded_format(
                16, "token", fitting_group(self.activations.group, site.in_features)
            ),
        )


def fitting_group(group: int, channels: int) -> int:
    """Return the largest of ``group``, its half, quarter, ... down to 16 that divides ``channels``.

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
    """Write the plan as readable JSON, in the order of the network."""
    rows = [
        asdict(entry) | {"site": entry.site.recorded(), "spec": entry.spec.recorded()}
        for entry in plan
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n")


def read_plan(path: Path) -> list[SitePlan]:
    """Read what :func:`write_plan` wrote."""
    return [
        SitePlan(
            Site.from_record(row["site"]),
            QuantSpec.from_dict(row["spec"]),
            row["rounding"],
            row["clip"],
            row["why"],
        )
        for row in json.loads(path.read_text())
    ]
