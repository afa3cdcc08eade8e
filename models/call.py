"""One call of a denoiser: its arguments as they were, on disk and back.

Arguments are nested lists, tuples and dicts of tensors and plain values. Tensors that several calls
share (a prompt's embeddings over all its steps) are stored once.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.disk import replacing

PLAIN = (bool, int, float, str, type(None))

DAMAGES = SafetensorError, FileNotFoundError, ValueError, LookupError, TypeError, AttributeError
"""What reading files that are gone or not what was written raises."""

PROBE = "probe"
PROBES = 4
"""Calls that `capture` keeps whole, from all over prompts and timesteps, of each denoiser: `fuse`
proves the network on the first, `rank` measures on all of them."""


@dataclass(frozen=True)
class Call:
    """Positional and keyword arguments of one forward of the transformer.

    ``part``  the component that is called, where a pipeline has several denoisers; else ""
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    part: str = ""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """Return the same call with every tensor changed."""
        args, kwargs = tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Call(args, kwargs, self.part)

    def on(self, device: torch.device, wide: torch.dtype | None = None) -> "Call":
        """Return it on ``device``; 16-bit tensors in ``wide`` where that is given."""

        def move(tensor: Tensor) -> Tensor:
            half = tensor.dtype in (torch.bfloat16, torch.float16)
            return tensor.to(device, wide if half and wide else tensor.dtype)

        return self.map(move)

    def tensors(self) -> list[Tensor]:
        """List every tensor, in order."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


def timestep(transformer: nn.Module, call: Call) -> float | None:
    """Return the timestep that a call is made for, as the pipeline states it; None if it does not.

    Of a batch, the mean. Pipelines call it ``timestep``, or ``t``.
    """
    try:
        forward = transformer.get_submodule(call.part).forward
        given = inspect.signature(forward).bind_partial(*call.args, **call.kwargs)
    except TypeError:  # arguments that a wrapper takes
        return None
    found = given.arguments.get("timestep", given.arguments.get("t"))
    if isinstance(found, Tensor) and found.numel():
        return float(found.double().mean())
    return float(found) if isinstance(found, int | float) else None


def save_calls(folder: Path, name: str, calls: Sequence[Call]) -> None:
    """Write the files that :func:`call_files` names.

    Raises UnsupportedError for an argument that is neither tensor nor plain value.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    trees = [
        {"args": _pack(c.args, tensors), "kwargs": _pack(c.kwargs, tensors)}
        | ({"part": c.part} if c.part else {})
        for c in calls
    ]
    tensor_file, tree_file = call_files(folder, name)
    with replacing(tensor_file) as scratch:
        save_file(tensors, scratch)
    with replacing(tree_file) as scratch:
        scratch.write_text(json.dumps(trees))


def call_files(folder: Path, name: str) -> tuple[Path, Path]:
    """Name ``<name>.safetensors``, the tensors, and ``<name>.json``, what holds them."""
    return folder / f"{name}.safetensors", folder / f"{name}.json"


def load_calls(folder: Path, names: Iterable[str]) -> list[Call]:
    """Read the calls of :func:`save_calls`, in order, on the CPU.

    Raises ArtifactError for files that are gone or not what was written.
    """
    calls = []
    for name in names:
        tensor_file, tree_file = call_files(folder, name)
        try:
            tensors = load_file(tensor_file)
            for tree in json.loads(tree_file.read_text()):
                args, kwargs = (_unpack(tree[name], tensors) for name in ("args", "kwargs"))
                calls.append(Call(args, kwargs, str(tree.get("part", ""))))
        except DAMAGES as error:
            raise ArtifactError(
                f"the recorded calls {tensor_file} are damaged ({error!r}); run the same command "
                "again: it records them anew"
            ) from error
    return calls


def by_part(calls: Sequence[Call]) -> dict[str, list[Call]]:
    """Return the calls of each denoiser, in order, by its component."""
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(call.part, []).append(call)
    return dict(sorted(found.items()))


def load_probe(capture: Artifact) -> list[Call]:
    """Read the probe calls of a capture, their files held against its manifest."""
    for file in call_files(Path(), PROBE):
        capture.file(file.name)
    return load_calls(capture.data, [PROBE])


def digest_of(tensor: Tensor) -> str:
    """Return the sha256 of a tensor's content."""
    flat = tensor.detach().cpu().reshape(-1)
    # One number that was expanded has the stride 0, which counts as contiguous but is no view.
    flat = flat.clone(memory_format=torch.contiguous_format)
    content: Any = flat.view(torch.uint8).numpy()
    return hashlib.sha256(content).hexdigest()


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest = digest_of(value)[:24]
        key = f"{digest}-{'x'.join(map(str, value.shape))}-{str(value.dtype)[6:]}"
        # A clone: safetensors refuses two names for one memory, as views of a batch have.
        tensors.setdefault(key, value.clone())
        return {"tensor": key}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(v, tensors) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[k, _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, PLAIN):
        return {"value": value}
    raise UnsupportedError(
        f"the pipeline hands its denoiser a {type(value).__name__} ({value!r:.60}); calls are "
        "recorded with tensors, numbers, strings, lists and dicts as arguments"
    )


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    [(kind, value)] = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "value":
        return value
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in value}
    items = [_unpack(v, tensors) for v in value]
    return items if kind == "list" else tuple(items)
