"""Full-size folders for `make bench-flux`: generated, and packed by our own pipeline."""

import time
from collections.abc import Sequence
from pathlib import Path

import dirotq
from dirotq.benchmarks.compress import generated
from dirotq.device import pick_device

CALIBRATION = ("prompts.calibration.count=2", "capture.calls=8")
"""Few calls: they decide what the numbers are, not how long a forward takes."""


def original(model: str, models: Path) -> Path:
    """The generated 16-bit pipeline, made if it is not there."""
    return generated(model, models, 1.0, pick_device("auto"))


def packed(
    model: str, models: Path, store: str, *, preset: str = "dirotq", overrides: Sequence[str] = ()
) -> Path:
    """Its packed folder; stages that the store has are not run again."""
    began = time.monotonic()
    made = dirotq.compress(
        f"model={original(model, models)}", f"store={store}", f"method={preset}", "until=pack",
        *CALIBRATION, *overrides,
    )  # fmt: skip
    folder = made["pack"].data / "model"
    print(f"packed {model}, {preset}: {folder} in {time.monotonic() - began:.0f} s", flush=True)
    return folder
