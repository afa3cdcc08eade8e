"""What docs/quality.md compares: rows as overrides of one experiment, by section."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODELS = ("tiny_flux", "tiny_pixart")
EXPERIMENT = "experiment=quality"
"""It keeps every site in one format (``sensitive=null``); rows say where it is otherwise."""


@dataclass(frozen=True, slots=True)
class Row:
    """``key`` names the stored result, ``text`` stands in the table; ``base`` is the row that it is
    compared with, image by image.
    """

    key: str
    text: str
    overrides: tuple[str, ...]
    base: str


def _row(key: str, text: str, overrides: str, base: str) -> Row:
    return Row(key, text, tuple(overrides.split()), base)


RIVAL, OURS = "svdquant", "dirotq"
LEVELS, RMS = "weight_format=lm4_channel", "act_format=int4_rms"
PRODUCT, PRINCIPAL = (f"basis.directions={which}" for which in ("product", "principal"))
DIROTQ = f"method=dirotq {PRODUCT}"
FORM = f"{DIROTQ} {LEVELS} {RMS}"
"""Directions and formats of the default, at every site: what other rows vary. By name, so that a
row stays what it was measured as when the default changes."""

GROUPS = "weight_format=int4_group method.weight_clip=false act_format=int4_group"
G64 = f"method=dirotq {PRINCIPAL} {GROUPS}"
INTEGERS = f"{DIROTQ} weight_format=int4_channel"

METHODS = (
    _row("rtn", "rtn, g64/g64", "method=rtn", RIVAL),
    _row("smoothquant", "smoothquant, g64/g64", "method=smoothquant", RIVAL),
    _row("quarot", "quarot, g64/g64", "method=quarot", RIVAL),
    _row("convrot", "convrot, g64/g64", "method=convrot", RIVAL),
    _row("quartz", "quartz, lzs/g64", "method=quartz", RIVAL),
    _row("absorb", "absorb, g64/g64", "method=absorb", RIVAL),
    _row("svdquant", "svdquant, g64/g64", "method=svdquant", RIVAL),
    _row(
        "svdquant_alike",
        "svdquant with Hadamard, rms/levels",
        f"method=svdquant transform.block=256 {LEVELS} method.weight_clip=true {RMS}",
        RIVAL,
    ),
    _row("instant", "instant W4A8, token/g64", "preset=instant until=validate", RIVAL),
    _row("dirotq_g64", "dirotq, g64/g64, principal directions", G64, RIVAL),
    _row(
        "dense",
        "dirotq_dense, rms/levels",
        f"method=dirotq_dense {LEVELS} {RMS} {PRINCIPAL}",
        RIVAL,
    ),
    _row("dirotq", "dirotq, rms/levels", FORM, RIVAL),
    _row(
        "default",
        "**dirotq, the default: the same, 8 bits where they matter**",
        f"{FORM} method.sensitive=auto",
        RIVAL,
    ),
)

FORMATS = (
    _row("integers", "rms/integers", f"{INTEGERS} {RMS}", OURS),
    _row("token", "token/levels", f"{DIROTQ} {LEVELS} act_format=int4_token", OURS),
    _row("lzs", "lzs/levels", f"{DIROTQ} {LEVELS} act_format=int4_lzs", OURS),
    _row("g64_channel", "g64/levels", f"{DIROTQ} {LEVELS} act_format=int4_group", OURS),
    _row(
        "g64_levels",
        "g64/g64 of levels",
        f"{DIROTQ} weight_format=lm4_group act_format=int4_group",
        "dirotq_g64",
    ),
    _row("w4a8", "W4A8, 8-bit floats/levels", f"method=dirotq_w4a8 {PRODUCT} {LEVELS}", OURS),
    _row("w4a8_int8", "W4A8, token/levels", f"method=dirotq_w4a8_int8 {PRODUCT} {LEVELS}", OURS),
    _row(
        "svdquant_w4a8", "svdquant W4A8, g64/g64", "method=svdquant act_format=int8_group", "w4a8"
    ),
    _row("nvfp4", "NVFP4", f"method=dirotq_nvfp4 {PRODUCT}", OURS),
    _row("mxfp4", "MXFP4", f"method=dirotq_mxfp4 {PRODUCT}", OURS),
)

RUNTIME = (
    _row(
        "default_bf16",
        "the default, bf16, kernels",
        f"{FORM} method.sensitive=auto dtype=bfloat16",
        "default",
    ),
    _row("rtn_bf16", "rtn, bf16, kernels", "method=rtn dtype=bfloat16", "rtn"),
)
"""Held against 16-bit images of their own precision."""

ALLOCATION = (
    _row(
        "budget",
        "budget of uniform r = 16, no A/B check",
        f"{FORM} rank=budget rank.like=16 rank.batch=64 rank.gate=0",
        OURS,
    ),
)

ABLATIONS = (
    _row("principal", "principal directions", f"{FORM} {PRINCIPAL}", OURS),
    _row("r0", "r = 0", f"{FORM} method.branch=null", OURS),
    _row("r8", "r = 8", f"{FORM} rank.r=8", OURS),
    _row("r32", "r = 32", f"{FORM} rank.r=32", OURS),
    _row("r64", "r = 64", f"{FORM} rank.r=64", OURS),
    _row("block1", "no Hadamard", f"{FORM} transform.block=1", OURS),
    _row("regular", "regular Hadamard blocks", f"{FORM} transform=regular", OURS),
    _row("nearest", "nearest rounding", f"{FORM} method.rounding=nearest", OURS),
    _row("damping1", "damping 0.1", f"{FORM} gptq.damping=0.1", OURS),
    _row("protected8", "8-bit low-rank branch", f"{FORM} branch.bits=8", OURS),
    _row(
        "modulators64",
        "modulators in groups of 64",
        f"{FORM} method.modulator_group=64",
        OURS,
    ),
    _row("text128", "text's keys, values W4A16", f"{FORM} method.text_group=128", OURS),
    _row("captions_first", "first 64 captions", f"{FORM} prompts.calibration.count=64", OURS),
    _row(
        "captions_last",
        "last 64 captions",
        f"{FORM} prompts.calibration.start=64 prompts.calibration.count=64",
        OURS,
    ),
)

KEPT = "encoders_keep"
ENCODERS = (
    _row(KEPT, "16-bit text encoders", FORM, KEPT),
    _row("encoders_w8", "text encoders w8", f"{FORM} text_encoders=w8", KEPT),
    _row("encoders_w4", "text encoders w4", f"{FORM} text_encoders=w4", KEPT),
)
"""Beside the same packed transformer, measured in one run with it."""

SECTIONS = {
    "methods": METHODS,
    "formats": FORMATS,
    "runtime": RUNTIME,
    "allocation": ALLOCATION,
    "ablations": ABLATIONS,
    "encoders": ENCODERS,
}


def rows(sections: tuple[str, ...] = tuple(SECTIONS)) -> list[Row]:
    return [row for section in sections for row in SECTIONS[section]]


def current(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return of stored rows, by key, those that were made by the overrides of today."""
    asked = {row.key: list(row.overrides) for row in rows()}
    return {key: row for key, row in stored.items() if row["overrides"] == asked.get(key)}
