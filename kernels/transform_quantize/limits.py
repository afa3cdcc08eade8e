"""What the Triton sweeps of ``transform_quantize`` can do. Needs neither triton nor a GPU."""

from ..spec import QuantSpec

GROUPS = (16, 32, 64, 128, 256)
"""Channels that may share an activation scale, if not the whole row does."""

MAX_BLOCK = 512


def why_not(spec: QuantSpec) -> str | None:
    """Why the sweeps can't quantize activations as ``spec`` says; None if they can."""
    if spec.act_bits == 16:
        return "16-bit activations are not quantized"
    if spec.block > MAX_BLOCK:
        return f"Hadamard block {spec.block} is larger than {MAX_BLOCK}"
    if spec.act_scale != "token" and spec.act_group not in GROUPS:
        allowed = f"{', '.join(map(str, GROUPS[:-1]))} and {GROUPS[-1]}"
        return f"activation groups of {spec.act_group} fit no kernel; {allowed} do"
    return None
