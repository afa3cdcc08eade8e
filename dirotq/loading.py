"""``dirotq.load``: a packed folder as a working diffusers pipeline."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dirotq.device import compute_dtype, pick_device
from dirotq.errors import ConfigError
from dirotq.files.sums import unchecked
from dirotq.packed.folder import held, packed_folder, variant_of
from dirotq.sources.opening import explained, open_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def load(
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    verify: bool = True,
) -> "DiffusionPipeline":
    """Load what ``pack`` wrote: a packed folder, or the ``pack`` artifact that holds one.

    device   ``auto``, ``cpu``, ``cuda``, ``cuda:N``
    dtype    of the parts that stay in 16 bits; float32 on a CPU and bfloat16 on a GPU by default
    variant  of the files, as ``save_pretrained(variant=...)`` named them; the only one by default
    verify   hold every file that is read against the digests in the folder (SHA256SUMS) first:
             once per process, in threads; False for a folder that was changed on purpose

    Raises ConfigError for arguments of another kind; ArtifactError if the folder holds no packed
    pipeline, or a file or tensor changed, is missing, damaged or extra; UnsupportedError if it was
    packed by a newer format, or needs code or packages that are not here. Running out of memory is
    told by Python's and torch's own errors.
    """
    target = pick_device(str(device))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r:.60}; use torch.bfloat16, float16 or float32")
    with explained(folder), held(folder):
        root = packed_folder(folder, verify=verify)
        with unchecked():  # done, or not wanted
            return open_pipeline(
                root, dtype or compute_dtype(target), target, variant=variant_of(root, variant)
            )
