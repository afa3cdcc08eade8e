"""``dirotq doctor``: what this machine has, and what would run on it. Never fails."""

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

from rich.filesize import decimal

from dirotq.errors import DirotqError
from dirotq.files.digest import cache_root
from dirotq.pipeline import graphics
from dirotq.pipeline.disk import writable
from dirotq.pipeline.place import store_place
from dirotq.pipeline.preflight import free_disk
from dirotq.pipeline.provenance import versions
from dirotq.pipeline.store import default_root

if TYPE_CHECKING:
    from dirotq.kernels.formats.spec import QuantSpec

FLUX_LINEARS = (
    # name, rows at 1024 x 1024 pixels, channels, outputs
    ("qkv", 4608, 3072, 9216),
    ("mlp down", 4608, 12288, 3072),
    ("modulator", 1, 3072, 18432),
)
"""Linears of FLUX.1 whose plans are shown, in the default method's formats."""


def add_doctor(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `doctor`."""
    add(_doctor, "what this machine has and what would run on it", "")


def _doctor(options: argparse.Namespace) -> int:
    """Say what is installed, which GPU there is, and what would run."""
    for name, found in findings():
        print(f"{name:<14}{found}", flush=True)  # at once: the next one may take seconds
    return 0


def findings() -> Iterator[tuple[str, str]]:
    """Yield (topic, what was found); what is missing or broken is a finding, not an error."""
    yield "python", platform.python_version()
    yield "platform", platform.platform()
    for name, version in versions().items():
        found = version or "missing: pip install -e ."
        if name in ("torch", "triton", "diffusers"):
            try:
                import_module(name)
            except Exception as error:  # noqa: BLE001 - whatever a broken install raises
                found += f" (import fails: {type(error).__name__}: {error})"
        yield name, found
    yield "optional", _optional()
    yield "gpu", "; ".join(map(str, graphics.installed())) or "none that nvidia-smi knows"
    usable, told = _cuda()
    yield "cuda", told
    fast, told = _kernels()
    yield "kernels", told
    if fast:
        yield "plans", _plans()
    yield "store", _store()
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    yield "hub", "offline (HF_HUB_OFFLINE=1)" if offline else "not used: models are local folders"
    yield (
        "would run",
        f"all stages on the {'GPU (device=cuda)' if usable else 'CPU (device=cpu)'}; "
        f"packed models on {'the Triton kernels' if fast else 'the torch reference path'}",
    )


def _optional() -> str:
    """Name packages that some models' folders need. A folder that lacks one is refused first."""
    from dirotq.sources.packages import OPTIONAL, installed

    missing = [f"{name} ({why})" for name, why in OPTIONAL.items() if not installed(name)]
    if not missing:
        return f"{', '.join(OPTIONAL)} are here"
    return f"not here, for models that need them: {'; '.join(missing)}"


def _store() -> str:
    try:
        store = store_place(default_root())
        return f"{store}, {decimal(free_disk(store))} free"
    except (DirotqError, OSError) as error:
        return f"unusable: {error}"


def _cuda() -> tuple[bool, str]:
    try:
        import torch  # nothing else in this package looks at it but _kernels and generate

        if not torch.cuda.is_available():
            build = torch.version.cuda or "none"
            return False, f"not usable by torch (built for CUDA {build})"
        major, minor = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        memory = f"{decimal(free)} of {decimal(total)} free"
        name = torch.cuda.get_device_name()
    except Exception as error:  # noqa: BLE001 - see findings
        return False, f"unknown: {type(error).__name__}: {error}"
    return True, f"{name}, sm_{major}{minor}, {memory}"


def _kernels() -> tuple[bool, str]:
    """Tell whether packed linears run on kernels here, and on which; or why they don't."""
    try:
        import torch

        from dirotq.kernels.chip import capability, why_reference
        from dirotq.kernels.formats import activation, weight
        from dirotq.kernels.formats.spec import QuantSpec
        from dirotq.kernels.formats.transform import PROJECT, Transform
        from dirotq.kernels.plan import choose

        chip = capability(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if chip is None or why_reference(chip):
            return False, f"torch reference path, right but slow: {why_reference(chip)}"
        plans = []
        for name, rows, channels, outputs in FLUX_LINEARS:
            modulator = name == "modulator"
            spec = QuantSpec(
                in_features=channels, out_features=(outputs,), rank=0 if modulator else 64,
                branch=PROJECT, transform=Transform(kind="hadamard", block=1 if modulator else 256,
                smooth=False), weights=weight.recorded_format("group" if modulator else "channel",
                64), activations=activation.recorded_format(16 if modulator else 4, "rms", 16),
            )  # fmt: skip
            _try(spec, rows)
            plan = choose(chip, rows, outputs, spec, torch.bfloat16)
            plans.append(f"FLUX {name} {rows} x {channels} -> {outputs}: {plan}")
    except Exception as error:  # noqa: BLE001 - see findings
        return False, f"unknown: {type(error).__name__}: {error}"
    return True, f"sm_{chip}; " + "; ".join(plans)


def _try(spec: "QuantSpec", rows: int) -> None:
    """Compile and run a linear's kernels once: those that fail are no plan any more."""
    import torch

    from dirotq.kernels.linear import QuantLinear

    with torch.no_grad():
        x = torch.zeros(rows, spec.in_features, device="cuda", dtype=torch.bfloat16)
        QuantLinear(replace(spec, out_features=(spec.outputs,)), bias=True, device="cuda")(x)
        torch.cuda.synchronize()


def _plans() -> str:
    """Say where the plans of this GPU's linears were measured, and how to measure them here."""
    try:
        import torch

        from dirotq.kernels import measured
        from dirotq.kernels.chip import capability

        chip = capability(torch.device("cuda"))
        assert chip is not None
        gpu, here = measured.gpu_of(chip), measured.triton_version()
        tables = measured.tuned(chip)
        mine = [table for table in tables if table.gpu == gpu]
        shipped = measured.shipped().get(str(chip))
    except Exception as error:  # noqa: BLE001 - see findings
        return f"unknown: {type(error).__name__}: {error}"
    if mine and mine[0].triton == here:
        return f"{mine[0].shapes} shapes measured on this GPU by `dirotq tune`, {mine[0].date}"
    if mine:
        said = f"measured on this GPU with triton {mine[0].triton}, which now is {here}"
    elif shipped:
        said = f"shipped for sm_{chip}, not measured on this GPU"
    elif tables:
        said = f"borrowed: measured on another sm_{chip}, {tables[0].gpu}"
    else:
        said = f"by rule: no measurement for sm_{chip}"
    return f"{said}; `dirotq tune` measures here{_unless_unwritable()}"


def _unless_unwritable() -> str:
    try:
        folder = cache_root() / "plans"
    except DirotqError as error:
        return f" ({error})"
    return "" if writable(folder) else f" once DIROTQ_CACHE is a folder of yours ({folder} is not)"
