"""A transformer's weights on disk, read by name when they are needed: never all at once.

Letters: D channels, N outputs of all linears of a site.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import safe_open
from torch import Tensor, nn

from dirotq.errors import ArtifactError, NumericalError
from dirotq.models.family import Site
from dirotq.models.skeleton import assign
from dirotq.sources.expected_tensors import weight_files
from dirotq.sources.weights_file import read_header

INDEX = "diffusion_pytorch_model.safetensors.index.json"
WHOLE = "diffusion_pytorch_model.safetensors"


class Weights:
    """The tensors of a diffusers transformer folder; errors are those of :func:`weight_files`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        for file in weight_files(folder, diffusers=True):
            self.files |= dict.fromkeys(read_header(file), file)

    def tensors(
        self, names: Iterable[str], device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Read the named tensors as stored, onto ``device``; each file is opened once.

        Raises ArtifactError naming the first tensor that no file holds.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise ArtifactError(
                    f"{self.folder} holds no tensor {name!r} of the transformer that its "
                    "config.json describes; the download is incomplete or mixed from two models"
                )
            by_file.setdefault(self.files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, inside in by_file.items():
            # Opened anew each time: pages of a file that stays mapped count as this process's RAM.
            with safe_open(file, framework="pt", device=str(device)) as tensors:
                found |= {name: tensors.get_tensor(name) for name in inside}
        return found

    def stacked(
        self, site: Site, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor | None]:
        """Read a site's linears as one: float32 weight [N, D] and bias [N] or None.

        Raises NumericalError naming the linear whose weights are not finite.
        """
        names = [f"{linear}.weight" for linear in site.linears]
        biases = [f"{linear}.bias" for linear in site.linears] if site.bias else []
        found = self.tensors([*names, *biases], device)
        for name, tensor in found.items():
            if not bool(tensor.isfinite().all()):
                raise NumericalError(
                    f"{name.rpartition('.')[0]}: the weights hold NaN or infinity; the checkpoint "
                    "is damaged, nothing downstream can be right"
                )
        # A 1x1 convolution's weight is [N, D, 1, 1].
        weight = torch.cat([found[name].float().flatten(1) for name in names])
        return weight, torch.cat([found[name].float() for name in biases]) if biases else None

    def fill(
        self,
        root: nn.Module,
        names: Iterable[str],
        device: torch.device,
        dtype: torch.dtype,
        *,
        keep: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Give ``root`` the named tensors, floating ones in ``dtype``, on ``device``.

        keep  where they go instead, for models that are streamed to a GPU
        """
        exact = set(getattr(root, "_keep_in_fp32_modules", None) or ())
        where = device if keep is None else "cpu"
        for name, tensor in self._in_turn(names, where):
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32 if exact & set(name.split(".")) else dtype)
            path, _, leaf = name.rpartition(".")
            assign(root.get_submodule(path), leaf, keep(tensor) if keep else tensor)

    def _in_turn(
        self, names: Iterable[str], device: torch.device | str
    ) -> Iterator[tuple[str, Tensor]]:
        """Read as :meth:`tensors`, file by file and a hundred at a time."""
        waiting = sorted(names, key=lambda name: str(self.files.get(name)))
        for start in range(0, len(waiting), 100):
            yield from self.tensors(waiting[start : start + 100], device).items()


def plan_shards(sizes: Mapping[str, int], limit: int) -> StateDictSplit:
    """Return which tensors go into which file.

    sizes  bytes of each tensor as it will be stored
    limit  bytes of a file; a larger tensor has a file of its own
    """
    return split_state_dict_into_shards_factory(
        dict(sizes),
        get_storage_size=lambda size: size,
        filename_pattern=WHOLE.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=limit,
    )


def write_index(folder: Path, shards: StateDictSplit) -> None:
    """Write the file that says which shard holds which tensor; nothing for a single file."""
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
