"""Pipelines: common, memory and caches, each on the 16-bit pipeline and on the packed one.

What fails for the former is diffusers' business (or this machine's); docs/diffusers.md says which.
"""

from tests.pipelines import testing_utils as theirs
from tiny import FluxPipelineConfig

MIXINS = {
    "Common": theirs.PipelineTesterMixin,
    "Lora": theirs.LoraTesterMixin,
    "Memory": theirs.MemoryTesterMixin,
    "PyramidAttentionBroadcast": theirs.PyramidAttentionBroadcastTesterMixin,
    "FasterCache": theirs.FasterCacheTesterMixin,
    "FirstBlockCache": theirs.FirstBlockCacheTesterMixin,
    "TaylorSeer": theirs.TaylorSeerCacheTesterMixin,
    "MagCache": theirs.MagCacheTesterMixin,
}

for name, mixin in MIXINS.items():
    for packed in (False, True):
        case = f"Test{name}{'Packed' if packed else 'Unpacked'}"
        globals()[case] = type(case, (FluxPipelineConfig, mixin), {"packed": packed})
