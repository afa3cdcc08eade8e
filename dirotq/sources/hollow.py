"""A pipeline whose denoisers have no weights yet: who needs them reads them from disk."""

from collections.abc import Mapping
from typing import Any

import torch

from .model import DiffusersModel
from .opening import read_pipeline


def open_hollow(
    model: DiffusersModel,
    dtype: torch.dtype,
    device: torch.device,
    given: Mapping[str, Any] | None = None,
) -> Any:
    """Open a 16-bit pipeline on the CPU, its denoisers without weights; it says ``device``.

    given  components that take the places of the folder's
    """
    network, folder = model.skeleton(), model.folder()
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)  # buffers stay as wide as they were computed
    denoisers = {
        part: network.get_submodule(inside)
        for part, inside in zip(model.parts, model.prefixes, strict=True)
    }
    pipe: Any = read_pipeline(folder, dtype, given={**denoisers, **(given or {})})
    # diffusers takes the first component's device for the pipeline's; ours come and go.
    here = property(lambda _: device)
    pipe.__class__ = type(
        type(pipe).__name__, (type(pipe),), {"device": here, "_execution_device": here}
    )
    return pipe
