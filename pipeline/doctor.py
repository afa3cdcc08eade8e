"""``dirotq doctor``: what this machine has, and what would run on it. Never fails."""

import argparse
import os
import platform
import shutil
from importlib import import_module
from pathlib import Path

from dirotq.pipeline.provenance import LIBRARIES, gpu, versions
from dirotq.pipeline.report import bytes_text
from dirotq.pipeline.store import default_root

__all__ = ["command", "findings"]


def command(args: list[str]) -> int:
    """Say what is installed, which GPU there is, and what would run."""
    argparse.ArgumentParser(prog="dirotq doctor", description=command.__doc__).parse_args(args)
    for name, found in findings().items():
        print(f"{name:<14}{found}")
    return 0


def findings() -> dict[str, str]:
    """{topic: what was found}; a thing that is missing or broken is a finding, not an error."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name, version in versions().items():
        found[name] = version or "missing: pip install -e ."
    for name in ("torch", "triton", "diffusers"):
        try:
            import_module(name)
        except Exception as error:  # noqa: BLE001 - whatever a broken install raises is the finding
            found[name] += f" (import fails: {type(error).__name__}: {error})"
    assert set(LIBRARIES) <= set(found)
    found["gpu"] = "; ".join(gpu()) or "none that nvidia-smi knows"
    usable, found["cuda"] = _cuda()
    store = Path(default_root()).absolute()
    place = next(path for path in (store, *store.parents) if path.exists())
    found["store"] = f"{store}, {bytes_text(shutil.disk_usage(place).free)} free"
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    found["hub"] = "offline (HF_HUB_OFFLINE=1)" if offline else "not used: models are local folders"
    found["would run"] = (
        f"all stages on the {'GPU (device=cuda)' if usable else 'CPU (device=cpu)'}; "
        "packed models on the torch reference path"
    )
    return found


def _cuda() -> tuple[bool, str]:
    try:
        import torch  # nothing else in this package looks at torch, but for generate

        if not torch.cuda.is_available():
            build = torch.version.cuda or "none"
            return False, f"not usable by torch (built for CUDA {build})"
        major, minor = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        memory = f"{bytes_text(free)} of {bytes_text(total)} free"
        name = torch.cuda.get_device_name()
    except Exception as error:  # noqa: BLE001 - see findings
        return False, f"unknown: {type(error).__name__}: {error}"
    return True, f"{name}, sm_{major}{minor}, {memory}"
