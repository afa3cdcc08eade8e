"""What the 8-bit attention kernels can do. Needs neither triton nor a GPU."""

from ..build import FP8_CHIPS
from ..chip import why_reference

MAX_HEAD = 128
"""Widest head: sums of 128 products of INT8 codes stay below 2^22, which the kernel counts on."""


def why_not(chip: int | None, head: int = MAX_HEAD) -> str | None:
    """Why heads of ``head`` channels have no 8-bit attention on a chip; None if they have.

    chip  compute capability (90: 9.0), or None for what is no NVIDIA GPU
    """
    if reason := why_reference(chip):
        return f"8-bit attention can't run: {reason}; use mode='exact'"
    assert chip is not None
    if chip < FP8_CHIPS[0]:
        return (
            f"8-bit attention can't run: the GPU has compute capability {chip / 10}, and FP8 takes "
            f"{FP8_CHIPS[0] / 10} or newer; use mode='exact'"
        )
    if not 0 < head <= MAX_HEAD:
        return (
            f"8-bit attention can't run: heads are {head} channels wide, and the kernel takes 1 to "
            f"{MAX_HEAD}; use mode='exact'"
        )
    return None
