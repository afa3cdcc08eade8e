"""NVFP4 and MXFP4: 4-bit floats whose groups share a scale that is itself a byte."""

from .reference import (
    GROUPS,
    LARGEST,
    SCALE_LARGEST,
    global_scale,
    group_scales,
    nearest_e2m1,
    pack_e2m1,
    steps,
    unpack_e2m1,
)

__all__ = [
    "GROUPS",
    "LARGEST",
    "SCALE_LARGEST",
    "global_scale",
    "group_scales",
    "nearest_e2m1",
    "pack_e2m1",
    "steps",
    "unpack_e2m1",
]
