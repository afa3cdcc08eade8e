"""A pipeline whose denoisers have no weights yet: who needs them reads them from disk."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .opening import read_pipeline


def open_hollow(
    folder: Path,
    denoisers: Mapping[str, nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    given: Mapping[str, Any],
) -> Any:
    """Open a checked 16-bit folder on the CPU, its denoisers without weights; it says ``device``.

    denoisers  by component, on the meta device
    given      components that take the places of the folder's
    """
    for module in denoisers.values():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)  # buffers stay as wide as they were computed
    pipe: Any = read_pipeline(folder, dtype, given={**denoisers, **given})
    # diffusers takes the first component's device for the pipeline's; ours come and go.
    here = property(lambda _: device)
    pipe.__class__ = type(
        type(pipe).__name__, (type(pipe),), {"device": here, "_execution_device": here}
    )
    return pipe
