"""What `make bench-models` measures: cases by name, contestants by word, the main ones first."""

from collections.abc import Iterable, Iterator, Mapping

from dirotq.benchmarks.forward_rows import COMPILED, EAGER, FP8
from dirotq.benchmarks.model_inputs import Case
from dirotq.benchmarks.ways import (
    ADAPTED,
    EAGER_ADAPTED,
    EAGER_OFFLOADED,
    NO_GRAPHS,
    OFFLOADED,
    PACKED,
    PACKED_ATTENTION,
    PACKED_INTEGERS,
    PLAIN,
)

CASES: Mapping[str, Case] = {
    "flux": Case("flux", 1024),
    "flux_512": Case("flux", 512),
    "flux_2048": Case("flux", 2048),
    "flux_x2": Case("flux", 1024, 2),
    "z_image": Case("z_image", 1024),
    "flux2_klein": Case("flux2_klein", 1024),
    "qwen_image": Case("qwen_image", 1024),
    "pixart_sigma": Case("pixart_sigma", 1024),
    "sana": Case("sana", 1024),
    "sana_x2": Case("sana", 1024, 2),
    "sd3": Case("sd3", 1024),
    "wan": Case("wan", 480),
}
FEWER: Mapping[str, Case] = {
    "qwen_image_20": Case("qwen_image", 1024, blocks=20),
    "wan_10": Case("wan", 480, blocks=10),
}
"""Where memory or time is short: not measured unless they are named."""
IMAGES = ("flux_images", "z_image_images")
"""Whole images (benchmarks/whole_images.py)."""

CONTESTANTS: Mapping[str, str] = {
    "packed": PACKED,
    "fp8_attention": PACKED_ATTENTION,
    "no_graph": NO_GRAPHS,
    "plain": PLAIN,
    "adapter": ADAPTED,
    "offload": OFFLOADED,
    "integers": PACKED_INTEGERS,
    "bf16": EAGER,
    "compiled": COMPILED,
    "bf16_adapter": EAGER_ADAPTED,
    "fp8": FP8,
    "bf16_offload": EAGER_OFFLOADED,
}
"""Those of one base follow one another; what can't be undone comes last."""
EVERY_SIZE = (PACKED, PACKED_ATTENTION, EAGER, COMPILED, FP8)
"""The others are measured at the first case of a model alone."""
IMAGE_CONTESTANTS = (PACKED, EAGER, COMPILED)
PROFILED = (PACKED, PACKED_INTEGERS)
"""Whose kernels can be listed (``--profile``)."""
COMPILING = (PACKED, COMPILED)
"""Whose first call is timed again, with compiled code on disk."""


def order(names: Iterable[str], contestants: Iterable[str]) -> Iterator[tuple[str, Case]]:
    """Yield who runs which case: one contestant of a network after the other, through its cases."""
    chosen = set(contestants)
    networks: dict[tuple[str, int | None], list[Case]] = {}
    for name in names:
        case = (CASES | FEWER)[name]
        networks.setdefault(case.network, []).append(case)
    for cases in networks.values():
        for who in (who for who in CONTESTANTS.values() if who in chosen):
            for case in cases if who in EVERY_SIZE else cases[:1]:
                yield who, case
