"""A safetensors file written tensor by tensor: none has to be in memory with another.

The layout is eight bytes for the length of the header, the header (JSON: dtype, shape and place of
each tensor), then the bytes (https://github.com/huggingface/safetensors). Wide types come first, as
the library puts them, so that all are aligned.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dirotq.pipeline.disk import replacing

DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
ALIGNED = 8

DtypeAndShape = tuple[torch.dtype, tuple[int, ...]]


def write_tensors(
    file: Path,
    signatures: Mapping[str, DtypeAndShape],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> int:
    """Write ``file``, whole or not at all; return its bytes.

    signatures  dtype and shape of every tensor
    tensors     the same ones, in any order

    Raises OSError as the file system does.
    """
    header, offsets = _header(signatures, metadata)
    with replacing(file, durable=True) as scratch, scratch.open("xb") as stream:
        stream.write(header)
        for name, tensor in tensors:
            dtype, shape = signatures[name]
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
            stream.seek(len(header) + offsets.pop(name))
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert not offsets, f"{len(offsets)} tensors were not written"
        return stream.seek(0, 2)


def _header(
    signatures: Mapping[str, DtypeAndShape], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for name in sorted(signatures, key=lambda name: (-signatures[name][0].itemsize, name)):
        dtype, shape = signatures[name]
        offsets[name], end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {
            "dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    return len(text).to_bytes(8, "little") + text, offsets
