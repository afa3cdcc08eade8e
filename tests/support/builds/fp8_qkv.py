"""q, k and v in FP8: heads of 128, 64 and 96 channels."""

from dirotq.kernels.build import FP8_CHIPS, Build, by_launch
from dirotq.kernels.fp8_qkv.kernel import measure_config, round_config


def builds() -> list[Build]:
    """Return both kernels for three widths of a head."""
    types = dict.fromkeys(("p_q", "p_k", "p_v"), "*bf16")
    types |= dict.fromkeys(("p_q8", "p_k8", "p_v8"), "*fp8e4nv")
    types |= dict.fromkeys(("p_bounds", "p_sums", "p_scales"), "*fp32")
    strides = [f"{x}_{of}" for x in "qkv" for of in ("batch", "row", "head")]
    return [
        Build.of(
            config, types, aligned=("chunk_q", "chunk_s", *strides), chips=chips,
            name=f"fp8_qkv_{name}-d{d}", tensor_core=dot,
        )
        for chips in by_launch(FP8_CHIPS)
        for d in (128, 64, 96)
        for name, config, dot in (
            ("measure", measure_config(d, chips[0]), False),
            ("measure-v", measure_config(d, chips[0], 2), False),
            ("round_codes", round_config(d, chips[0]), True),
        )
    ]  # fmt: skip
