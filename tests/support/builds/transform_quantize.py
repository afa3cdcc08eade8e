"""Configurations of ``transform_quantize`` that are compiled for chips that are not here."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dirotq.kernels.appended import columns_with_appended
from dirotq.kernels.build import CHIPS, FP8_CHIPS, Build, Config, by_launch
from dirotq.kernels.formats.fp4 import GROUPS as FP4_GROUPS
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.permuted import padded
from dirotq.kernels.prologue import Kind
from dirotq.kernels.transform_quantize import configs, fp4

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
    """Return every pass as it runs: b = 32 ... 512, each scale, both containers."""
    return [*_large(), *_small(), *_roundings(), *_fp4()]


def _large() -> list[Build]:
    """Return ``project`` and ``rotate``, of whose configurations many are one."""
    rms = _spec(act_scale="rms", act_group=16)
    kinds: tuple[Kind, ...] = ("plain", "gelu", "concat")
    found: list[Build] = []
    beside = {"b256-r256-plain-16": 192}
    for name, spec, kind, codes in (  # codes and not z leave ``rotate``
        *((f"b256-r64-{kind}-16", rms, kind, True) for kind in kinds),
        ("b256-r64-plain-0", _spec(), "plain", False),
        ("b256-r64-plain-1", _spec(act_scale="rms", act_bits=8), "plain", True),
        # Columns that fill neither a tile nor a step.
        ("b32-r64-plain-32", _spec(2272, 32, act_scale="rms", act_group=32), "plain", True),
        ("b512-r64-plain-0", _spec(block=512), "plain", False),
        ("b256-r128-plain-0", _spec(rank=128), "plain", False),
        ("b256-r256-plain-16", replace(rms, rank=256), "plain", True),
        ("b256-r0-plain-0", _spec(rank=0), "plain", False),
    ):
        for chip in FP8_CHIPS if spec.activations.element == "e4m3" else CHIPS:
            shapes = configs.usual(kind, chip)
            if spec.rank:
                config = configs.project(
                    spec, kind, chip, torch.bfloat16, shapes, parts=PARTS if codes else 1,
                    beside=beside.get(name, 0), squares=codes, amax=not codes,
                )  # fmt: skip
                types = {"p_c": "*fp32", "p_amax": "*fp32"} if codes else {}
                _add(found, f"project-{name}", config, types, chip)
            out = "*fp8e4nv" if chip in FP8_CHIPS else "*i8"
            types = {"p_z": out, "p_amax": "*fp32"} if codes else {}
            # Of a concatenation, each part is launched.
            for gelu in (False, True) if kind == "concat" else (kind == "gelu",):
                config = configs.rotate(
                    spec, chip, torch.bfloat16, shapes, channels=spec.in_features, gelu=gelu,
                    protected=spec.rank - beside.get(name, 0), codes=codes,
                )  # fmt: skip
                part = "-gelu" if gelu and kind == "concat" else ""
                _add(found, f"rotate-{name}{part}", config, types, chip)
    return found


def _add(found: list[Build], name: str, config: Config, types: dict[str, str], chip: int) -> None:
    """Append the build unless there is such a one for the chip."""
    if not any(b.config == config and chip in b.chips for b in found):
        # What two of 255 registers too few cost, in thousands of instructions.
        spills = 0 if chip in (90, 100) else 64
        found.append(_build(name, config, types, (chip,), spills=spills))


def _small() -> list[Build]:
    found = []
    rms, floats = _spec(act_scale="rms", act_group=16), _spec(act_scale="rms", act_bits=8)
    for chips in by_launch():
        gather = configs.gather(rms, chips[0], parts=PARTS)
        found.append(_build("gather", gather, {}, chips, tensor_core=False))
    for spec, parts in ((rms, PARTS), (rms, 1), (floats, PARTS)):
        for appended in (True, False):
            name = f"scale-rows-{spec.activations.bits}-{parts}{'-appended' if appended else ''}"
            fp8 = appended or spec.activations.element == "e4m3"
            found += _writers(name, configs.scale_rows, spec, appended, fp8, parts=parts, beside=0)
    return found


def _roundings() -> list[Build]:
    found = []
    for scale, group, bits, fp8, appended in (
        ("pow2", 16, 4, True, True), ("pow2", 64, 4, True, True), ("token", 64, 4, True, True),
        ("pow2", 16, 4, False, False), ("pow2", 64, 4, False, False),
        ("token", 64, 4, False, False), ("token", 64, 8, False, False),
        ("group", 64, 4, True, False), ("group", 64, 4, False, False),
        ("group", 128, 4, False, False), ("group", 64, 8, False, False),
    ):  # fmt: skip
        spec = _spec(act_scale=scale, act_group=group, act_bits=bits)
        name = f"round-{scale}{group}-{bits}-{'fp8' if fp8 else 'int8'}"
        found += _writers(name, configs.round_rows, spec, appended, fp8)
    return found


def _fp4() -> list[Build]:
    found = []
    for name, group in FP4_GROUPS.items():
        spec = _spec(act_scale=name, act_group=group, weight_scale=name, weight_group=group)
        types = {"p_scale": "*u8", "p_codes": "*u8", "p_row": "*fp32"}
        for chips in by_launch():
            found.append(
                _build(
                    f"round-{name}", fp4.config(spec, chips[0]), types, chips,
                    given={"p_row": None} if name == "mxfp4" else {}, tensor_core=False,
                )
            )  # fmt: skip
    return found


def _writers(
    name: str,
    configure: Callable[..., Config],
    spec: QuantSpec,
    appended: bool,
    fp8: bool,
    **more: int,
) -> list[Build]:
    """Return the builds of a kernel that writes scales; ``appended``: columns, with a bias."""
    behind = columns_with_appended(spec.width, spec.rank, True) - padded(spec.width)
    types = {"p_scale": "*fp32", "p_codes": "*fp8e4nv" if fp8 else "*i8"}
    return [
        _build(
            name, configure(spec, chips[0], behind if appended else None, bias=appended, **more),
            types, chips, tensor_core=False,
        )
        for chips in by_launch(FP8_CHIPS if fp8 else CHIPS)
    ]  # fmt: skip


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
