"""Pipelines: common, memory and caches, each on the 16-bit pipeline and on the packed one.

What fails for the former is diffusers' business (or this machine's); docs/diffusers.md says which.
"""

from tests.pipelines import testing_utils as theirs
from tiny import FluxPipelineConfig, TinyPipelineConfig

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

OTHERS = "pixart", "sd3", "sana", "z_image", "qwen_image", "flux2"
"""Families whose pipelines are tested beside FLUX.1's: common and memory."""

for family in OTHERS:
    for name in ("Common", "Memory"):
        for packed in (False, True):
            case = f"Test_{family}_{name}_{'Packed' if packed else 'Unpacked'}"
            fields = {"packed": packed, "family": family}
            globals()[case] = type(case, (TinyPipelineConfig, MIXINS[name]), fields)
