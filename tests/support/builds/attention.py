"""8-bit attention: heads of 128, 72 and 64 channels."""

from dirotq.kernels.attention.kernel import (
    HOPPER,
    OTHERS,
    forward_config,
    round_config,
    summarize_config,
    usual,
)
from dirotq.kernels.build import FP8_CHIPS, Build, Config


def builds() -> list[Build]:
    """Return the kernels that make codes, and every tile: heads of 128, 72 and 64 channels."""
    found = [
        _build(f"d{d}", config, FP8_CHIPS, tensor_core=False)
        for d in (128, 72)
        for config in (summarize_config(d), round_config(d))
    ]
    for tile in (HOPPER, OTHERS):
        chips = tuple(chip for chip in FP8_CHIPS if usual(chip) == tile)
        for d, keys in ((128, 4096), (128, 4097), (72, 4096), (64, 4096)):
            name = f"d{d}-{tile.bm}x{tile.bn}{'' if keys % tile.bn == 0 else '-masked'}"
            found.append(_build(name, forward_config(tile, d, keys), chips))
    return found


def _build(name: str, config: Config, chips: tuple[int, ...], *, tensor_core: bool = True) -> Build:
    types = {"p_q8": "*i8", "p_k8": "*i8", "p_v8": "*fp8e4nv", "factor": "fp32"}
    types |= dict.fromkeys(("p_q", "p_k", "p_v", "p_y"), "*bf16")
    types |= dict.fromkeys(("p_sums", "p_sq", "p_sk", "p_sv", "p_mean"), "*fp32")
    if config.constants.get("TMA"):
        hd, bm, bn = (config.constants[n] for n in ("HD", "BM", "BN"))
        types["q_codes"] = f"tensordesc<i8[{bm}, {hd}]>"
        types["k_codes"] = f"tensordesc<i8[{bn}, {hd}]>"
        types["v_codes"] = f"tensordesc<fp8e4nv[{hd}, {bn}]>"
    else:
        types |= {"q_codes": "*i8", "k_codes": "*i8", "v_codes": "*fp8e4nv"}
    strides = [f"{x}_{of}" for x in "qkvy" for of in ("batch", "row", "head")]
    return Build.of(
        config, types, aligned=("chunk", *strides),
        name=f"attention_{config.kernel.__name__}-{name}", chips=chips, tensor_core=tensor_core,
    )  # fmt: skip
