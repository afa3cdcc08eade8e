"""Generated images on disk: Zarr, 16-bit fixed point, one image per chunk; float32 sounds beside.

8 bits would be too coarse: two images rounded to 1/255 differ by a PSNR of 55.9 dB if they were
equal before, which takes 0.7 dB off a score of 48 dB. 1/65535 leaves the limit at 104 dB.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.codecs import BloscCodec, Crc32cCodec

from dirotq.errors import ArtifactError
from dirotq.pipeline.units import Units
from dirotq.progress import track
from dirotq.sources.generation import generate_with_sound
from dirotq.sources.prompts import Prompt

STEPS = 65535
"""A stored integer is a brightness times this."""


class ImageWriter:
    """``count`` images called ``name`` in the Zarr group ``tree``, written batch by batch.

    A missing chunk reads as zeros without an error, so an image counts as written once the seconds
    that it took are on disk, after it: they are NaN until then. A writer opened on what a killed
    run left goes on there, with the images whose units are intact (``units`` has removed others).

    ``device``, ``dtype``  what makes the images and in which precision, kept beside their times
    ``units``  of the stage's folder, which notes each image; None: for trees that nobody resumes

    Raises ArtifactError if images of that name were begun in another precision.
    """

    def __init__(
        self,
        tree: Path,
        name: str,
        count: int,
        *,
        device: str = "",
        dtype: str = "",
        units: Units | None = None,
    ) -> None:
        self.tree, self.name, self.count, self.units = tree, name, count, units
        self.group = zarr.open_group(tree, mode="a")
        if _seconds(name) not in self.group:
            self.group.create_array(
                _seconds(name), shape=(count,), chunks=(1,), dtype="float64",
                fill_value=float("nan"), attributes={"devices": [device], "dtype": dtype},
            )  # fmt: skip
        attributes: Any = _array(self.group, _seconds(name)).attrs
        if attributes["dtype"] != dtype:
            raise ArtifactError(
                f"{tree}: the images {name!r} were begun in {attributes['dtype']}, this run "
                f"computes in {dtype}; go on with dtype={attributes['dtype']}, or remove {tree}"
            )
        if device not in attributes["devices"]:
            attributes["devices"] = [*attributes["devices"], device]
            self._note(i for i, is_done in enumerate(self._done()) if is_done)

    def missing(self, batch: int) -> list[range]:
        """List the batches of up to ``batch`` images, in order, that are not wholly written."""
        done = self._done()
        starts = range(0, self.count, batch)
        batches = [range(start, min(start + batch, self.count)) for start in starts]
        return [batch for batch in batches if not done[batch.start : batch.stop].all()]

    def write(
        self, start: int, images: Tensor, seconds: float, sounds: Tensor | None = None
    ) -> None:
        """Write images [B, 3, H, W] or videos [B, F, 3, H, W], floats in [0, 1], from ``start`` on.

        seconds  time per image of this batch
        sounds   float [B, channels, samples] that belong to the videos, or None

        Raises ValueError for images outside of [0, 1] or more than there is place for.
        """
        if not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"images {self.name}[{start}:{start + len(images)}] are not in [0, 1]: "
                f"from {images.min():.3g} to {images.max():.3g}"
            )
        if start + len(images) > self.count:
            raise ValueError(f"{len(images)} images from {start} on exceed {self.count}")
        if self.name not in self.group:
            self._create(tuple(images.shape[1:]))
        # The setting is not stored with an array: a black image must leave a chunk too.
        array = _array(self.group, self.name).with_config({"write_empty_chunks": True})
        stored = (images.double() * STEPS).round().cpu().numpy().astype(np.uint16)
        array[start : start + len(images)] = stored
        if sounds is not None:
            self._write_sounds(start, sounds)
        _array(self.group, _seconds(self.name))[start : start + len(images)] = seconds
        self._note(range(start, start + len(images)))

    def _done(self) -> np.ndarray:
        return ~np.isnan(_array(self.group, _seconds(self.name))[...])

    def _note(self, indices: Iterable[int]) -> None:
        """Note one unit per image: its pixels, its seconds, and what describes both arrays."""
        if self.units is None:
            return
        arrays = [self.name, _seconds(self.name)]
        arrays += [sound for sound in [_sound(self.name)] if sound in self.group]
        for index in indices:
            chunks = [self.tree / _chunk(_array(self.group, name), index) for name in arrays]
            about = [self.tree / name / "zarr.json" for name in arrays]
            self.units.finish(f"{self.name} {index}", [*chunks, *about])

    def _write_sounds(self, start: int, sounds: Tensor) -> None:
        name, shape = _sound(self.name), tuple(sounds.shape[1:])
        if name not in self.group:
            self.group.create_array(
                name, shape=(self.count, *shape), chunks=(1, *shape), dtype="float32",
                fill_value=float("nan"),  # one that is missing is not silent
                compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
            )  # fmt: skip
        array = _array(self.group, name)
        array[start : start + len(sounds)] = sounds.float().cpu().numpy()

    def _create(self, shape: tuple[int, ...]) -> None:
        self.group.create_array(
            self.name, shape=(self.count, *shape), chunks=(1, *shape), dtype="uint16",
            # Shuffling parts the smooth high bytes from the noisy low ones; the checksum is for
            # runs that resume, whose files no manifest covers yet.
            compressors=[BloscCodec(cname="zstd", clevel=1, shuffle="shuffle"), Crc32cCodec()],
        )  # fmt: skip


def generate_all(
    writer: ImageWriter,
    pipe: Any,
    prompts: Sequence[Prompt],
    call: Mapping[str, Any],
    batch: int,
    what: str,
) -> None:
    """Generate whatever ``writer`` lacks, ``batch`` prompts at a time.

    Each batch is written before the next one starts. ``what`` names the images in the progress
    line.
    """
    for span in track(writer.missing(batch), what):
        began = time.perf_counter()
        images, sounds = generate_with_sound(pipe, prompts[span.start : span.stop], call)
        writer.write(span.start, images, (time.perf_counter() - began) / len(span), sounds)


def read_images(tree: Path, name: str, indices: Sequence[int] | slice = slice(None)) -> Tensor:
    """Read images ``name`` of the Zarr group ``tree``: float32 [B, 3, H, W] in [0, 1].

    Videos come as [B, F, 3, H, W].

    Raises ArtifactError if there are no images of that name, or one was never finished, is gone
    (Zarr would read a black one), or does not match its checksum.
    """
    group = zarr.open_group(tree, mode="r")
    array, seconds = _find(group, tree, name), read_seconds(tree, name)
    wanted = range(len(seconds))[indices] if isinstance(indices, slice) else list(indices)
    if unfinished := [i for i in wanted if seconds[i].isnan()]:
        raise ArtifactError(
            f"{tree}: image {unfinished[0]} of {name!r} was never finished; "
            "run the command that makes them again, it goes on where it stopped"
        )
    images = np.empty((len(wanted), *array.shape[1:]), np.float32)
    for place, index in enumerate(wanted):
        try:
            images[place] = np.asarray(array[index])
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(
                f"{tree}: image {index} of {name!r} is damaged ({error})"
            ) from error
        if not (tree / _chunk(array, index)).exists():
            raise ArtifactError(f"{tree}: image {index} of {name!r} is gone; somebody removed it")
    return torch.from_numpy(images).div_(STEPS)


def read_sounds(tree: Path, name: str, indices: slice) -> Tensor | None:
    """Read the sounds of images ``name``: float32 [B, channels, samples]; None if there are none.

    Raises ArtifactError if one is gone, was never written, or does not match its checksum.
    """
    group = zarr.open_group(tree, mode="r")
    if _sound(name) not in group:
        return None
    try:
        sounds = torch.from_numpy(np.asarray(_array(group, _sound(name))[indices]))
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(f"{tree}: a sound of {name!r} is damaged ({error})") from error
    if not sounds.isfinite().all():
        raise ArtifactError(f"{tree}: a sound of {name!r} is gone; somebody removed it")
    return sounds


def read_seconds(tree: Path, name: str) -> Tensor:
    """Read the seconds that each image of ``name`` took: float64 [N], NaN if not written.

    Raises ArtifactError if there are no images of that name, or the file of one is damaged.
    """
    found = _find(zarr.open_group(tree, mode="r"), tree, _seconds(name))
    try:
        return torch.from_numpy(np.asarray(found[...]))
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(f"{tree}: a time of {name!r} is damaged ({error})") from error


def typical_seconds(tree: Path, name: str) -> float:
    """Return the median of :func:`read_seconds`: one that waited for a warm-up tells nothing."""
    return float(read_seconds(tree, name).nanmedian())


def made_on(tree: Path, name: str) -> str:
    """Name the device that made the images; several, if a run moved on."""
    return "; ".join(_attributes(tree, name)["devices"])


def made_in(tree: Path, name: str) -> str:
    """Name the dtype that the images were computed in."""
    return str(_attributes(tree, name)["dtype"])


def has_images(tree: Path, name: str) -> bool:
    """Return whether ``tree`` holds images of that name."""
    return name in zarr.open_group(tree, mode="r")


def _attributes(tree: Path, name: str) -> dict[str, Any]:
    return dict(_find(zarr.open_group(tree, mode="r"), tree, _seconds(name)).attrs)


def _sound(name: str) -> str:
    return f"{name}_sound"


def _seconds(name: str) -> str:
    return f"{name}_seconds"


def _chunk(array: zarr.Array, index: int) -> str:
    """Name the file of one image, or of its seconds, in the tree."""
    place = (index, *(0 for _ in array.shape[1:]))
    return f"{array.path}/{array.metadata.encode_chunk_key(place)}"


def _find(group: zarr.Group, tree: Path, name: str) -> zarr.Array:
    if name not in group:
        raise ArtifactError(f"{tree} has no images {name!r}; it has {sorted(group.array_keys())}")
    return _array(group, name)


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return array
