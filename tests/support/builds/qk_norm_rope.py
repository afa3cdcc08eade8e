"""Norms and rotary embedding: FLUX's blocks, other heads, and neither weights nor rope."""

from dirotq.kernels.build import Build, by_launch
from dirotq.kernels.qk_norm_rope.kernel import norm_config, norm_rope


def builds() -> list[Build]:
    """Return FLUX's two kinds of blocks in both dtypes; other heads; without weights or rope."""
    both = {"rope": True, "copy": True, "q_weight": True, "k_weight": True}
    alone, plain = both | {"copy": False}, dict.fromkeys(both, False)
    kinds = [
        (f"{kind}-{name}", kind, 128, options)
        for kind in ("bf16", "fp16")
        for name, options in (("double", both), ("single", alone))
    ]
    kinds += [(f"bf16-d{dim}", "bf16", dim, both) for dim in (32, 64, 72, 256)]
    kinds += [("bf16-plain", "bf16", 128, plain)]
    return [_build(*kind, chips) for kind in kinds for chips in by_launch()]


def _build(
    name: str, kind: str, dim: int, options: dict[str, bool], chips: tuple[int, ...]
) -> Build:
    config = norm_config(dim, chips[0], **options)
    types = {n: f"*{kind}" for n in norm_rope.arg_names if n.startswith("p_")}
    return Build.of(
        config, types | {"p_cos": "*fp32", "p_sin": "*fp32", "eps": "fp32"},
        aligned=("a_batch", "a_row", "b_batch", "b_row"), name=f"qk_norm_rope-{name}",
        chips=chips, tensor_core=False,
    )  # fmt: skip
