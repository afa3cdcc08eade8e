"""Safetensors files: whole, or told to be damaged; what their headers say."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.files.digest import Stamp, stamp

AGAIN = "download it again, or make it again with `dirotq compress`"

Header = Mapping[str, tuple[str, tuple[int, ...]]]
"""{tensor: (dtype as safetensors spells it, shape)}."""


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a safetensors file, whose header says where the file has to end.

    Raises ArtifactError if the header can't be read or the file isn't as long as it says.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ArtifactError(
            f"{file} is damaged or was not written to its end ({error}); {AGAIN}"
        ) from error
    except OSError as error:
        raise ArtifactError(f"{file} can't be read: {error}") from error


def read_header(file: Path) -> Header:
    """Read name, dtype and shape of every tensor, once; ArtifactError as :func:`open_weights`."""
    return _header(file, stamp(file) if file.exists() else None)


def refuse_quantized(header: Header, name: str) -> None:
    """Raise UnsupportedError if weights are stored in fewer than 16 bits."""
    for tensor, (dtype, _) in header.items():
        whole = dtype[0] in "IUB" and dtype != "BF16" and tensor.endswith((".weight", ".bias"))
        if whole or dtype.startswith(("F8", "F6", "F4")) or dtype in ("I8", "U8", "I4", "U4"):
            raise UnsupportedError(
                f"{name} is already quantized: {tensor} is stored as {dtype} (fp8, int8, nf4 and "
                "other files of fewer than 16 bits have lost what DiRotQ would measure). Compress "
                "the 16-bit model that it was made from"
            )


@functools.lru_cache(maxsize=256)
def _header(file: Path, _: Stamp | None) -> Header:
    with open_weights(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
