"""``dirotq.load``: a packed folder as a working diffusers pipeline."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dirotq.device import compute_dtype, expandable_segments, pick_device, refuse_vram
from dirotq.errors import ConfigError
from dirotq.files.json_file import INDEX, components, denoisers, read_json
from dirotq.files.sums import unchecked
from dirotq.models.autoencoders import tile
from dirotq.packed.folder import held, packed_folder, variant_of
from dirotq.pipeline.sizes import parse_vram
from dirotq.quantize.running import Way, of_folder
from dirotq.quiet import heed, quiet
from dirotq.sources.opening import explained, open_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)


def load(
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    verify: bool = True,
    vram: str | int | None = None,
) -> "DiffusionPipeline":
    """Load what ``pack`` wrote: a packed folder, or the ``pack`` artifact that holds one.

    device   ``auto``, ``cpu``, ``cuda``, ``cuda:N``
    dtype    of the parts that stay in 16 bits; float32 on a CPU and bfloat16 on a GPU by default
    variant  of the files, as ``save_pretrained(variant=...)`` named them; the only one by default
    verify   hold every file that is read against the digests in the folder (SHA256SUMS) first:
             once per process, in threads; False for a folder that was changed on purpose
    vram     GPU memory to stay within ("24GB"): no CUDA graphs are recorded, images are decoded in
             tiles, and weights wait in host memory (by components, or by layers), as far as that
             takes, and a log line says so; by default the GPU's free memory decides, between none,
             components and layers. torch is asked for expandable segments, unless the environment
             says something of its allocator or CUDA is in use; in the second case a log line says
             so

    Raises ConfigError for arguments of another kind, and for a ``vram`` that can't be met;
    ArtifactError if the folder holds no packed pipeline, or a file or tensor changed, is missing,
    damaged or extra; UnsupportedError if it was packed by a newer format, or needs code or packages
    that are not here. Running out of memory is told by Python's and torch's own errors.
    """
    target = pick_device(str(device))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r:.60}; use torch.bfloat16, float16 or float32")
    limit = None if vram is None else _limit(vram, target)
    with explained(folder), held(folder):
        root = packed_folder(folder, verify=verify)
        way = None if limit is None else of_folder(root).choose(limit)
        if way is not None:
            log.warning("within %.3g GB of GPU memory, %s", (limit or 0) / 1e9, way.said)
        return _open(root, target, dtype or compute_dtype(target), variant, way)


def load_to_run(
    folder: Path, way: Way, device: torch.device, dtype: torch.dtype
) -> "DiffusionPipeline":
    """Load a packed folder as :func:`load` does, to run in a way that was chosen already."""
    with explained(folder), held(folder):
        return _open(packed_folder(folder), device, dtype, None, way)


def load_denoisers(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Load the packed denoisers of a folder alone, by component, into host memory."""
    import diffusers  # slow

    with explained(folder), held(folder):
        root = packed_folder(folder)
        index = read_json(root / INDEX)
        with unchecked(), quiet() as said:
            found = {
                part: getattr(diffusers, components(index)[part][1]).from_pretrained(
                    root / part, dtype=dtype, use_safetensors=True, local_files_only=True
                )
                for part in denoisers(index)
            }
        heed(said)
        return found


def _open(
    root: Path, device: torch.device, dtype: torch.dtype, variant: str | None, way: Way | None
) -> "DiffusionPipeline":
    with unchecked():  # done, or not wanted
        pipe = open_pipeline(
            root,
            dtype,
            device,
            variant=variant_of(root, variant),
            offloading=None if way is None else way.offloading,
        )
    if way is not None and way.tiled:
        tile(pipe.vae)
    if way is not None and way.offloading == "none" and not way.graphs:
        from dirotq.runtime.accelerate import accelerate  # slow: diffusers

        accelerate(pipe, graphs=False)
    return pipe


def _limit(vram: str | int, device: torch.device) -> int:
    """Return ``vram`` in bytes. Raises ConfigError without a GPU, or for more than it has."""
    wanted = parse_vram(vram, "vram")
    refuse_vram(vram, device, "vram")
    if not expandable_segments():
        log.warning(
            "torch may hold GPU memory beside what its tensors take: CUDA was used before this "
            "model was loaded. Set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before that"
        )
    there = torch.cuda.get_device_properties(device).total_memory
    if wanted > there:
        raise ConfigError(
            f"vram={vram} is more than {torch.cuda.get_device_name(device)} has "
            f"({there / 1e9:.1f} GB): give less, or leave it out"
        )
    return wanted
