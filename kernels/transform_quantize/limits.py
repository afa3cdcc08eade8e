"""What the Triton sweeps of ``transform_quantize`` can do. Needs neither triton nor a GPU."""

from ..spec import QuantSpec

GROUPS = (16, 32, 64, 128, 256)
"""Channels that may share an activation scale, if not the whole row does."""

MAX_BLOCK = 512

MAX_RANK = 128
"""Largest rank that ``rotate`` projects out; above it, plain matrix products do."""


def why_not_method(spec: QuantSpec) -> str | None:
    """What of a method only the reference path computes; None if kernels exist."""
    if spec.transform == "regular":
        return "regular Hadamard matrices have no kernel"
    if spec.smooth:
        return "smoothed activations have no kernel"
    if spec.rank and spec.branch == "beside":
        return "a protected branch beside the whole input has no kernel"
    if spec.rank and spec.protected_bits == 8:
        return "8-bit protected branches have no kernel"
    return None


def why_not(spec: QuantSpec) -> str | None:
    """Why the sweeps can't quantize activations as ``spec`` says; None if they can."""
    if spec.act_bits == 16:
        return "16-bit activations are not quantized"
    if spec.block > MAX_BLOCK:
        return f"Hadamard block {spec.block} is larger than {MAX_BLOCK}"
    grouped = spec.act_scale != "token" and not spec.act_floats
    if grouped and spec.act_group not in GROUPS:
        allowed = f"{', '.join(map(str, GROUPS[:-1]))} and {GROUPS[-1]}"
        return f"activation groups of {spec.act_group} fit no kernel; {allowed} do"
    return None
