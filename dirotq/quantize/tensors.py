"""Tensors in files: Zarr arrays for what is read in part, safetensors for what is read whole.

And the loop that reads one ahead.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
import zarr
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dirotq.calibrate.aside import Aside
from dirotq.device import dtype_name
from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.pipeline.disk import replacing
from dirotq.transfer import download, upload

T = TypeVar("T")
R = TypeVar("R")
BYTES_PER_CHUNK = 16 << 20
CPU = torch.device("cpu")
AGAIN = "run the same command again: it makes that part anew"


def create_array(group: zarr.Group, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Create an array in chunks along its first axis, replacing one of that name.

    bfloat16, which Zarr lacks, is kept as its bits.
    """
    row = dtype.itemsize * math.prod(shape[1:])
    # Chunks of equal size: Zarr fills the last one up.
    chunks = -(-shape[0] * row // BYTES_PER_CHUNK)
    kind = "uint16" if dtype == torch.bfloat16 else dtype_name(dtype)
    group.create_array(
        name,
        shape=shape,
        chunks=(-(-shape[0] // max(min(chunks, shape[0]), 1)), *shape[1:]),
        dtype=kind,
        compressors=None,  # bf16 gains a fifth and float32 nothing, at a tenth of the speed
        overwrite=True,
        attributes={"torch_dtype": dtype_name(dtype)},
    )


def write_array(group: zarr.Group, name: str, tensor: Tensor) -> None:
    """Write a whole array, replacing one of that name."""
    create_array(group, name, tuple(tensor.shape), tensor.dtype)
    write_rows(group, name, 0, tensor)


def write_rows(group: zarr.Group, name: str, start: int, rows: Tensor) -> None:
    """Write ``rows`` [n, ...] at row ``start``, in the array's dtype. One writer per chunk."""
    array = _array(group, name)
    rows = download(rows.to(_dtype(array))).contiguous()
    bits = rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows
    array[start : start + len(rows)] = bits.numpy()


def read_array(group: zarr.Group, name: str) -> Tensor:
    """Read the whole array as a tensor of the dtype it was written in.

    Raises ArtifactError if it is not there, damaged, or lacks a chunk (Zarr would read zeros).
    """
    array = _array(group, name)
    try:
        tensor, dtype = torch.from_numpy(array[...]), _dtype(array)
    except (ValueError, KeyError, AttributeError, FileNotFoundError) as error:
        raise ArtifactError(f"{_place(group, name)} is damaged ({error}); {AGAIN}") from error
    # Counted after reading: a chunk that went missing meanwhile is missing now.
    if (found := array.nchunks_initialized) != array.nchunks:
        raise ArtifactError(
            f"{_place(group, name)} has {found} of its {array.nchunks} chunks: the others were "
            f"removed; {AGAIN}"
        )
    return tensor.view(dtype) if dtype == torch.bfloat16 else tensor


def save_site(folder: Path, site: str, tensors: Mapping[str, Tensor]) -> Path:
    """Write ``folder/<site>.safetensors``, whole or not at all, whoever else writes it."""
    target = folder / site_file(site)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(target) as scratch:
        save_file({name: download(t).contiguous() for name, t in tensors.items()}, scratch)
    return target


def load_site(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read what :func:`save_site` wrote, on ``device``.

    Raises ArtifactError if the file is gone or no whole safetensors file.
    """
    try:
        return {name: upload(tensor, device) for name, tensor in load_file(path).items()}
    except (SafetensorError, FileNotFoundError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); {AGAIN}") from error


def site_file(site: str) -> str:
    """Return the name of a site's file. Raises UnsupportedError for one that names a folder too."""
    if "/" in site:
        raise UnsupportedError(f"site {site}: a module with '/' in its name has no file of its own")
    return f"{site}.safetensors"


def ahead(
    load: Callable[[T], R], items: Iterable[T], device: torch.device = CPU
) -> Iterator[tuple[T, R]]:
    """Yield ``(item, load(item))`` in order, loading one item ahead in a thread.

    At most two loaded items are alive: the one yielded and the next.

    device  where ``load`` puts tensors, beside what is computed there
    """
    aside = Aside(device)

    def loaded(item: T) -> R:
        with aside.after(None):
            return load(item)

    def taken(coming: Future[R]) -> R:
        found = coming.result()
        aside.hand_over(tree_leaves(found))
        return found

    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = (item, pool.submit(loaded, item))
            if waiting is not None:
                yield waiting[0], taken(waiting[1])
            waiting = following
        if waiting is not None:
            yield waiting[0], taken(waiting[1])


def _array(group: zarr.Group, name: str) -> zarr.Array:
    try:
        array = group[name]
    except (KeyError, ValueError, FileNotFoundError) as error:
        raise ArtifactError(f"{_place(group, name)} is gone or damaged; {AGAIN}") from error
    assert isinstance(array, zarr.Array)
    # A missing chunk reads as zeros without an error, so every chunk is written. The setting is not
    # stored with the array: it has to be made wherever one is opened.
    return array.with_config({"write_empty_chunks": True})


def _place(group: zarr.Group, name: str) -> str:
    return f"{group.store_path}/{name}"


def _dtype(array: zarr.Array) -> torch.dtype:
    return getattr(torch, str(array.attrs["torch_dtype"]))
