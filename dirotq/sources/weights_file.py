"""Safetensors files: whole, or told to be damaged."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from dirotq.errors import ArtifactError

AGAIN = "download it again, or make it again with `dirotq compress`"


def check_weights(file: str | Path) -> None:
    """Read a safetensors file's header, which says where the file has to end.

    Raises ArtifactError if the header can't be read or the file isn't as long as it says.
    """
    count_tensors(file)


def count_tensors(file: str | Path) -> int:
    """Number of tensors in a safetensors file; raises as :func:`check_weights`."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return len(tensors.keys())
    except SafetensorError as error:
        raise ArtifactError(
            f"{file} is damaged or was not written to its end ({error}); {AGAIN}"
        ) from error
    except OSError as error:
        raise ArtifactError(f"{file} can't be read: {error}") from error
