"""The transformer: quantization, memory and caches. Of 16 bits, what is no test of quantization."""

from tiny import FluxModelConfig

from tests.models import testing_utils as theirs

MIXINS = {
    "Common": theirs.ModelTesterMixin,
    "Memory": theirs.MemoryTesterMixin,
    "Attention": theirs.AttentionTesterMixin,
    "PyramidAttentionBroadcast": theirs.PyramidAttentionBroadcastTesterMixin,
    "FasterCache": theirs.FasterCacheTesterMixin,
    "FirstBlockCache": theirs.FirstBlockCacheTesterMixin,
    "TaylorSeer": theirs.TaylorSeerCacheTesterMixin,
    "MagCache": theirs.MagCacheTesterMixin,
}

for name, mixin in MIXINS.items():
    for packed in (False, True):
        case = f"Test{name}{'Packed' if packed else 'Unpacked'}"
        globals()[case] = type(case, (FluxModelConfig, mixin), {"packed": packed})
