"""What docs/quality.md compares: rows as overrides of one experiment, by section."""

from dataclasses import dataclass

MODELS = ("tiny_flux", "tiny_pixart")
EXPERIMENT = "experiment=quality"


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
    words = overrides.split()
    ours = any(word in words for word in OURS_BY_NAME) or "method=" not in overrides
    if ours and "weight_format=" not in overrides and "preset=" not in overrides:
        words.append("weight_format=int4_channel")  # the default when most rows were measured
    return Row(key, text, tuple(words), base)


G64 = "weight_format=int4_group method.weight_clip=false act_format=int4_group"
CHANNEL = "weight_format=int4_channel method.weight_clip=true"
POW2 = "act_format=int4_pow2"
"""The default until scales of the root mean square: what most rows vary."""
RIVAL, OURS = "svdquant", "dirotq"
OURS_BY_NAME = ("method=dirotq", "method=dirotq_w4a8", "method=dirotq_w4a8_int8")
"""Methods that take the weights' format from conf/config.yaml."""

METHODS = (
    _row("rtn", "rtn, g64/g64", "method=rtn", RIVAL),
    _row("smoothquant", "smoothquant, g64/g64", "method=smoothquant", RIVAL),
    _row("quarot", "quarot, g64/g64", "method=quarot", RIVAL),
    _row("convrot", "convrot, g64/g64", "method=convrot", RIVAL),
    _row("absorb", "absorb, g64/g64", "method=absorb", RIVAL),
    _row("svdquant", "svdquant, g64/g64", "method=svdquant", RIVAL),
    _row("dense_g64", "dirotq_dense, g64/g64", f"method=dirotq_dense {G64}", RIVAL),
    _row("dirotq_g64", "**dirotq, g64/g64**", f"method=dirotq {G64}", RIVAL),
    _row("dense", "dirotq_dense, pow2/channel", f"method=dirotq_dense {POW2}", RIVAL),
    _row("dirotq", "dirotq, pow2/channel", f"method=dirotq {POW2}", RIVAL),
    _row("dirotq_rms", "dirotq, rms/channel", "method=dirotq", RIVAL),
    _row(
        "dirotq_lm4",
        "dirotq, rms/channel of levels",
        "method=dirotq weight_format=lm4_channel",
        RIVAL,
    ),
    _row(
        "dirotq_lm4_auto",
        "**the same, 8 bits where they matter (default)**",
        "method=dirotq weight_format=lm4_channel method.sensitive=auto",
        RIVAL,
    ),
    _row(
        "svdquant_token",
        "svdquant, token/channel",
        f"method=svdquant act_format=int4_token act_format.group=64 {CHANNEL}",
        RIVAL,
    ),
    _row("dirotq_token", "dirotq, token/channel", "method=dirotq act_format=int4_token", RIVAL),
    _row("instant", "instant W4A8, token/g64", "preset=instant until=validate", RIVAL),
)

FP4 = "weight_format={0} act_format={0}"
FORMATS = (
    *(
        _row(
            f"pow2_{group}",
            f"dirotq, pow2 of {group}/channel",
            f"{POW2} act_format.group={group}",
            OURS,
        )
        for group in (64, 32, 16)
    ),
    _row("rms_16", "dirotq, rms of 16/channel", "", "pow2_16"),
    _row(
        "dirotq_g64_lm4",
        "dirotq, g64/g64 of levels",
        "weight_format=lm4_group act_format=int4_group",
        "dirotq_g64",
    ),
    _row("g64_channel", "dirotq, g64/channel", "act_format=int4_group", OURS),
    _row(
        "pow2_g64",
        "dirotq, pow2/g64",
        f"{POW2} weight_format=int4_group method.weight_clip=false",
        OURS,
    ),
    _row(
        "dirotq_g128",
        "dirotq, g128/g128",
        f"method=dirotq {G64} weight_format.group=128 act_format.group=128",
        OURS,
    ),
    _row("dirotq_w4a8", "dirotq W4A8, token/channel", "method=dirotq_w4a8_int8", OURS),
    _row("dirotq_fp8", "dirotq W4A8, 8-bit floats/channel", "method=dirotq_w4a8", "pow2_16"),
    _row("svdquant_w4a8", "svdquant W4A8, g64/g64", "method=svdquant act_format=int8_group", OURS),
    _row("rtn_nvfp4", "rtn NVFP4", "method=rtn_nvfp4", OURS),
    _row("svdquant_nvfp4", "svdquant NVFP4", f"method=svdquant {FP4.format('nvfp4')}", OURS),
    _row("dirotq_nvfp4", "dirotq NVFP4", "method=dirotq_nvfp4", OURS),
    _row("rtn_mxfp4", "rtn MXFP4", "method=rtn_mxfp4", OURS),
    _row("svdquant_mxfp4", "svdquant MXFP4", f"method=svdquant {FP4.format('mxfp4')}", OURS),
    _row("dirotq_mxfp4", "dirotq MXFP4", "method=dirotq_mxfp4", OURS),
)

RUNTIME = (
    _row("dirotq_bf16", "dirotq, bf16, kernels", f"method=dirotq {POW2} dtype=bfloat16", OURS),
    _row("rtn_bf16", "rtn, bf16, kernels", "method=rtn dtype=bfloat16", OURS),
)
"""Held against 16-bit images of their own precision."""

BUDGET = "rank=budget rank.like=16 rank.batch=64"
ALLOCATION = (
    _row("budget", "budget of uniform r = 16, gated", f"{POW2} {BUDGET} rank.gate=64", OURS),
    _row("budget_ungated", "the same, no gate", f"{POW2} {BUDGET} rank.gate=0", OURS),
    _row("worst", "r = 16, worst 3 sites A8", POW2 + " rank.sensitive={count:3,act_bits:8}", OURS),
)

ABLATIONS = (
    _row("r0", "r = 0", f"{POW2} method.branch=null", OURS),
    _row("r8", "r = 8", f"{POW2} rank.r=8", OURS),
    _row("r32", "r = 32", f"{POW2} rank.r=32", OURS),
    _row("r64", "r = 64", f"{POW2} rank.r=64", OURS),
    _row("block1", "no Hadamard", f"{POW2} transform.block=1", OURS),
    _row("nearest", "nearest rounding", f"{POW2} method.rounding=nearest", OURS),
    _row(
        "svdquant_hadamard", "svdquant with Hadamard", "method=svdquant transform.block=256", RIVAL
    ),
    _row("protected8", "8-bit protected branch", f"{POW2} branch.bits=8", OURS),
    _row("modulators64", "modulators in groups of 64", "method.modulator_group=64", "rms_16"),
    _row("text128", "keys and values of the text W4A16", "method.text_group=128", "rms_16"),
    _row("calls32", "32 calls", f"{POW2} capture.calls=32", OURS),
    _row("captions_first", "first 64 captions", f"{POW2} prompts.calibration.count=64", OURS),
    _row(
        "captions_last",
        "last 64 captions",
        f"{POW2} prompts.calibration.start=64 prompts.calibration.count=64",
        OURS,
    ),
    _row("regular", "regular Hadamard blocks", f"{POW2} transform=regular", OURS),
    _row("svdquant_r32", "svdquant, r = 32", "method=svdquant rank.r=32", "svdquant"),
    _row("svdquant_r8", "svdquant, r = 8", "method=svdquant rank.r=8", "svdquant"),
    _row("dirotq_g64_r8", "dirotq g64/g64, r = 8", f"{G64} rank.r=8", "dirotq_g64"),
    _row("dirotq_g64_r32", "dirotq g64/g64, r = 32", f"{G64} rank.r=32", "dirotq_g64"),
    _row("calls8", "8 calls", f"{POW2} capture.calls=8", OURS),
    _row("calls128", "128 calls", f"{POW2} capture.calls=128", OURS),
    _row("calls1024", "1024 calls", f"{POW2} capture.calls=1024", OURS),
    _row("damping1", "damping 0.1", f"{POW2} gptq.damping=0.1", OURS),
    _row("damping001", "damping 0.001", f"{POW2} gptq.damping=0.001", OURS),
    _row("damping03", "damping 0.03", f"{POW2} gptq.damping=0.03", OURS),
    _row("block16", "Hadamard blocks of 16", f"{POW2} transform.block=16", OURS),
    _row("block64", "Hadamard blocks of 64", f"{POW2} transform.block=64", OURS),
    _row("absorb003", "absorb, λ = 0.003", "method=absorb basis.regularization=0.003", "absorb"),
    _row("absorb3", "absorb, λ = 0.3", "method=absorb basis.regularization=0.3", "absorb"),
)

SECTIONS = {
    "methods": METHODS,
    "formats": FORMATS,
    "runtime": RUNTIME,
    "allocation": ALLOCATION,
    "ablations": ABLATIONS,
}


def rows(sections: tuple[str, ...] = tuple(SECTIONS)) -> list[Row]:
    return [row for section in sections for row in SECTIONS[section]]
