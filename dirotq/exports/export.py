"""``dirotq.export``: a packed folder as one file that other programs read."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dirotq.errors import ArtifactError, ConfigError
from dirotq.exports.formats import format_named, refuse_misfits
from dirotq.exports.layer_format import LayerFormat
from dirotq.exports.layers import KeptTensor, PackedLayer, native_layers
from dirotq.exports.tensor_file import DtypeAndShape, write_tensors
from dirotq.files.json_file import read_json
from dirotq.kernels.linear import QuantLinear, frozen
from dirotq.models.skeleton import empty_transformer
from dirotq.packed.config import Entry, check_places, read_packing
from dirotq.packed.folder import held, packed_folder, variant_of
from dirotq.packed.swap import put_packed
from dirotq.pipeline.disk import writable
from dirotq.progress import track
from dirotq.quantizer import STORED, Signature, check_numbers, hold_tensors
from dirotq.sources.opening import explained
from dirotq.sources.weights import Weights

RECORD = "comfy_quant"
"""Name of the tensor that holds a layer's JSON, below the layer's."""
SPACES = 8
"""Length that a record is filled up to a multiple of, so that what lies behind it is aligned."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the file, its bytes, its layers in 4 bits by format, and 16-bit tensors."""

    file: Path
    size: int
    layers: Mapping[str, int]
    kept: int


def export(
    folder: str | Path,
    format: str,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
) -> Exported:
    """Write a packed folder's transformer as one safetensors file with native key names.

    folder     a packed folder, or the ``pack`` artifact that holds one
    format     ``convrot_w4a4``, ``svdquant_w4a4``, ``nvfp4`` or ``comfy_nvfp4`` (docs/export.md)
    out        the file; <folder>-<format>.safetensors in the working folder by default
    overwrite  replace a file that is there
    verify     hold every file of the folder against its digests first

    Codes and scales are copied, not rounded again. Memory is that of a layer.

    Raises UnsupportedError if the format can't hold the model's plan (it names methods that it can
    hold), the family has no native names, or the folder is of a newer format; ArtifactError if the
    folder is damaged; ConfigError for a place that can't be written to, or that is taken.
    """
    wanted = format_named(format)
    with explained(folder), held(folder):
        root = packed_folder(folder, verify=verify)
        file = _place(out, Path(folder), root, wanted, overwrite=overwrite)
        config = read_json(root / "transformer" / "config.json")
        packing = config["quantization_config"]
        entries = read_packing(packing.get("sites"), packing.get("format"), packing.get("levels"))
        if variant := variant_of(root, None):
            raise ArtifactError(
                f"{folder} holds variant={variant!r:.60} alone; an export reads the files without "
                "a variant, as `dirotq compress` wrote them"
            )
        weights = Weights(root / "transformer")
        kept = _check(config, entries, weights)
        layers, rest = native_layers(config["_class_name"], entries, kept)
        refuse_misfits(wanted, entries)
        signatures = dict(_signatures(wanted, layers, rest, weights))
        size = write_tensors(
            file,
            signatures,
            _tensors(wanted, layers, rest, weights),
            {"format": "pt", "dirotq_export": wanted.name},
        )
    counts: dict[str, int] = {}
    for layer in layers:
        name = wanted.of(layer.spec).name
        counts[name] = counts.get(name, 0) + 1
    return Exported(file, size, counts, len(rest))


def _place(
    out: str | Path | None, folder: Path, root: Path, wanted: LayerFormat, *, overwrite: bool
) -> Path:
    """Return the file to write, refused before anything is read if it can't be."""
    name = folder.expanduser().resolve().name
    file = Path(f"{name}-{wanted.name}.safetensors" if out is None else out).expanduser()
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; name the file to write, `--out NAME.safetensors`")
    if file.suffix != ".safetensors":
        raise ConfigError(f"{file} doesn't end in .safetensors, by which readers know the format")
    if file.exists() and not overwrite:
        raise ConfigError(
            f"{file} is there already; name another with `--out FILE`, or replace it with "
            "`--overwrite`"
        )
    parent = file.absolute().parent
    if not parent.is_dir() or not writable(parent):
        raise ConfigError(f"{parent} is no folder that can be written to; `--out` names another")
    if root.resolve() in (file.absolute().parent.resolve() / file.name).parents:
        raise ConfigError(
            f"{file} lies in the packed folder, whose digests name every file in it; write it "
            "elsewhere with `--out FILE`"
        )
    return file


def _check(config: dict[str, Any], entries: Sequence[Entry], weights: Weights) -> list[str]:
    """Hold the files' tensors against the config; return the names of those outside of sites."""
    import diffusers

    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        raise ArtifactError(
            f"{weights.folder}/config.json names the class {config.get('_class_name')!r:.60}, "
            f"which diffusers {diffusers.__version__} doesn't have; upgrade it, or download the "
            "model again"
        )
    transformer = empty_transformer(config, cls)
    check_places(transformer, entries)
    put_packed(transformer, entries)
    found = {n: Signature(tuple(shape), dtype) for n, (dtype, shape) in weights.header.items()}
    hold_tensors(transformer, found)
    sites = {site.name for site, _ in entries}
    return [name for name in transformer.state_dict() if name.rpartition(".")[0] not in sites]


def _signatures(
    wanted: LayerFormat,
    layers: Iterable[PackedLayer],
    rest: Iterable[KeptTensor],
    weights: Weights,
) -> Iterator[tuple[str, DtypeAndShape]]:
    """Yield dtype and shape of every tensor of the file, from shapes alone."""
    for layer in layers:
        empty = QuantLinear(layer.spec, bias=layer.site.bias, device="meta")
        for name, tensor in _layer_tensors(wanted, layer, empty).items():
            yield name, (tensor.dtype, tuple(tensor.shape))
    for one in rest:
        shapes = [weights.header[name][1] for name in one.stored]
        rows = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()
        yield one.native, (STORED, rows)


def _tensors(
    wanted: LayerFormat,
    layers: Sequence[PackedLayer],
    rest: Sequence[KeptTensor],
    weights: Weights,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the file, one site in memory at a time."""
    site, packed = "", None
    for layer in track(layers, "export"):
        if packed is None or layer.site.name != site:
            site, packed = layer.site.name, _read(layer, weights)
        yield from _layer_tensors(wanted, layer, packed).items()
    for one in rest:
        parts = list(weights.tensors(one.stored).values())
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        yield one.native, torch.cat(joined.chunk(2)[::-1]) if one.swapped else joined


def _read(layer: PackedLayer, weights: Weights) -> QuantLinear:
    """Read a site, its numbers checked as the loader checks them."""
    linear = QuantLinear(layer.spec, bias=layer.site.bias, device="meta")
    names = {f"{layer.site.name}.{buffer}": buffer for buffer, _ in linear.named_parameters()}
    for name, tensor in weights.tensors(names).items():
        setattr(linear, names[name], frozen(tensor))
    check_numbers(layer.site.name, linear)
    return linear


def _layer_tensors(
    wanted: LayerFormat, layer: PackedLayer, linear: QuantLinear
) -> dict[str, Tensor]:
    written = wanted.of(layer.spec)
    part = linear.packed().rows(layer.rows)
    tensors = dict(written.tensors(part, layer.spec))
    if part.bias is not None:
        tensors["bias"] = part.bias
    if written.record is not None:
        text = json.dumps(written.record(layer.spec)).encode()
        length = SPACES * math.ceil(len(text) / SPACES)
        tensors[RECORD] = torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8)
    return {f"{layer.native}.{name}": tensor.detach() for name, tensor in tensors.items()}
