"""What is compiled of ``transform_quantize`` for chips that are not here."""

import itertools
from typing import Any

import torch

from ..appended import columns_with_appended
from ..build import CHIPS, FP8_CHIPS, Build, Config, by_launch
from ..formats.spec import QuantSpec
from ..permuted import padded
from ..prologue import Kind
from . import configs
from .shapes import DEFAULT, usual

POINTERS = {
    "p_x": "*bf16", "p_basis": "*bf16", "p_c": "*bf16", "p_spread": "*bf16", "p_z": "*bf16",
    "p_amax": "*i32", "p_row": "*fp32", "root": "fp32", "one": "fp32", "p_behind": "*bf16",
    "p_scale": "*bf16", "p_shift": "*bf16", "p_y": "*bf16", "p_parts": "*fp32",
    "p_squares": "*fp32", "eps": "fp32",
}  # fmt: skip
ALIGNED = (
    "M", "T", "D", "K", "image_x", "stride_x", "image_behind", "stride_behind", "stride_scale",
    "split", "part", "stride_z", "stride_codes", "main", "columns",
)  # fmt: skip
PARTS = 4
"""What few rows are cut into."""


def builds() -> list[Build]:
    """Every sweep in the configurations that run: b = 32 ... 512, each scale, both containers."""
    return [*_projections(), *_rotations(), *_small(), *_roundings()]


def _sweeps() -> list[tuple[str, QuantSpec, Kind, bool]]:
    """Name, spec, prologue, and whether codes and not z leave ``rotate``."""
    rms = _spec(act_scale="rms", act_group=16)
    kinds: tuple[Kind, ...] = ("plain", "norm", "gelu", "concat")
    return [
        *((f"b256-r64-{kind}-16", rms, kind, True) for kind in kinds),
        ("b256-r64-plain-0", _spec(), "plain", False),
        ("b256-r64-plain-1", _spec(act_scale="rms", act_bits=8), "plain", True),
        # Columns that fill neither a tile nor a step.
        ("b32-r64-plain-32", _spec(2272, 32, act_scale="rms", act_group=32), "plain", True),
        ("b512-r64-plain-0", _spec(block=512), "plain", False),
        ("b256-r128-plain-0", _spec(rank=128), "plain", False),
        ("b256-r0-plain-0", _spec(rank=0), "plain", False),
    ]


def _projections() -> list[Build]:
    found: list[Build] = []
    for name, spec, kind, codes in _sweeps():
        if spec.rank == 0:
            continue
        read: Kind = "plain" if kind == "norm" else kind  # ``normalize`` has added up squares
        for chip in CHIPS:
            config = configs.project(
                spec, read, chip, torch.bfloat16, usual(read, chip), parts=PARTS if codes else 1,
                squares=codes and kind != "norm", amax=not codes,
            )  # fmt: skip
            types = {"p_c": "*fp32", "p_amax": "*fp32"} if codes else {}
            _add(found, f"project-{name}", config, types, chip)
    return found


def _rotations() -> list[Build]:
    found: list[Build] = []
    for name, spec, kind, codes in _sweeps():
        for chip in FP8_CHIPS if spec.activations.element == "e4m3" else CHIPS:
            out = "*fp8e4nv" if chip in FP8_CHIPS else "*i8"
            types = {"p_z": out, "p_amax": "*fp32"} if codes else {}
            sweeps = usual("plain" if kind == "norm" else kind, chip)
            # Of a concatenation, each part is launched.
            for gelu in (False, True) if kind == "concat" else (kind == "gelu",):
                config = configs.rotate(
                    spec, chip, torch.bfloat16, sweeps, channels=spec.in_features, gelu=gelu,
                    protected=spec.rank > 0, codes=codes,
                )  # fmt: skip
                part = "-gelu" if gelu and kind == "concat" else ""
                _add(found, f"rotate-{name}{part}", config, types, chip)
    return found


def _add(found: list[Build], name: str, config: Config, types: dict[str, str], chip: int) -> None:
    """Unless there is such a build for the chip."""
    if not any(b.config == config and chip in b.chips for b in found):
        # What two of 255 registers too few cost, in thousands of instructions.
        spills = 0 if chip in (90, 100) else 64
        found.append(_build(name, config, types, (chip,), spills=spills))


def _small() -> list[Build]:
    normalize = configs.normalize(3072, squares=True)
    found = [_build("normalize", normalize, {}, CHIPS, tensor_core=False)]
    rms, floats = _spec(act_scale="rms", act_group=16), _spec(act_scale="rms", act_bits=8)
    for chips in by_launch():
        gather = configs.gather(rms, chips[0], parts=PARTS)
        found.append(_build("gather", gather, {}, chips, tensor_core=False))
    cases = itertools.product(((rms, PARTS), (rms, 1), (floats, PARTS)), (True, False))
    for (spec, squares), appended in cases:
        fp8 = appended or spec.activations.element == "e4m3"
        for chips in by_launch(FP8_CHIPS if fp8 else CHIPS):
            config = configs.scale_rows(
                spec, chips[0], columns=_behind(spec) if appended else None, bias=appended,
                parts=PARTS, squares=squares,
            )  # fmt: skip
            types = {"p_scale": "*fp32", "p_codes": "*fp8e4nv" if fp8 else "*i8"}
            name = f"scale-rows-{spec.activations.bits}-{squares}{'-appended' if appended else ''}"
            found.append(_build(name, config, types, chips, tensor_core=False))
    return found


def _roundings() -> list[Build]:
    found = []
    s = DEFAULT["plain"].round_rows
    for scale, group, bits, fp8, appended in (
        ("pow2", 16, 4, True, True), ("pow2", 64, 4, True, True), ("token", 64, 4, True, True),
        ("pow2", 16, 4, False, False), ("pow2", 64, 4, False, False),
        ("token", 64, 4, False, False), ("token", 64, 8, False, False),
        ("group", 64, 4, True, False), ("group", 64, 4, False, False),
        ("group", 128, 4, False, False), ("group", 64, 8, False, False),
    ):  # fmt: skip
        spec = _spec(act_scale=scale, act_group=group, act_bits=bits)
        columns = _behind(spec) if appended else None
        types = {"p_scale": "*fp32", "p_codes": "*fp8e4nv" if fp8 else "*i8"}
        for chips in by_launch(FP8_CHIPS if fp8 else CHIPS):
            config = configs.round_rows(spec, chips[0], s, columns=columns, bias=appended)
            name = f"round-{scale}{group}-{bits}-{'fp8' if fp8 else 'int8'}"
            found.append(_build(name, config, types, chips, tensor_core=False))
    return found


def _build(
    name: str, config: Config, types: dict[str, str], chips: tuple[int, ...], **more: Any
) -> Build:
    name = f"transform_quantize_{name}"
    return Build.of(config, POINTERS | types, aligned=ALIGNED, name=name, chips=chips, **more)


def _spec(dim: int = 3072, block: int = 256, rank: int = 64, **activations: Any) -> QuantSpec:
    usual: dict[str, Any] = {"act_bits": 4, "act_scale": "token", "act_group": 64}
    flat = {
        "dim": dim, "rows": (9216,), "rank": rank, "transform": "hadamard", "block": block,
        "weight_bits": 4, "weight_scale": "channel", "weight_group": 64,
    }  # fmt: skip
    return QuantSpec.from_dict(flat | usual | activations)


def _behind(spec: QuantSpec) -> int:
    """Columns appended with a bias."""
    return columns_with_appended(spec.width, spec.rank, True) - padded(spec.width)
