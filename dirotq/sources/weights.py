"""Weights on disk: which files hold them, what headers say, tensors read by name when needed.

Letters: D channels, N outputs of all linears of a site.
"""

import collections
import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dirotq.errors import ArtifactError, NumericalError, UnsupportedError
from dirotq.files.digest import Stamp, stamp
from dirotq.files.json_file import weight_map
from dirotq.models.denoisers import prefix
from dirotq.models.family import Site
from dirotq.models.skeleton import assign
from dirotq.transfer import upload

log = logging.getLogger(__name__)

INDEX = "diffusion_pytorch_model.safetensors.index.json"
WHOLE = "diffusion_pytorch_model.safetensors"
POINTER = b"version https://git-lfs"
"""How the text begins that stands for a file in a clone without its large files."""
AGAIN = "download it again, or make it again with `dirotq compress`"

Device = torch.device | str
Header = Mapping[str, tuple[str, tuple[int, ...]]]
"""{tensor: (dtype as safetensors spells it, shape)}."""


class Weights:
    """The tensors of a diffusers transformer folder; errors are those of :func:`weight_files`.

    parts  components below ``folder`` that are read as one network; each name begins with its own
    """

    def __init__(self, folder: Path, parts: Sequence[str] = ("",)) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.header: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._prefixes: dict[Path, str] = {}
        self._zero = False
        for part in parts:
            before = prefix(part)
            for file in weight_files(folder / part, diffusers=True):
                header = {before + name: line for name, line in read_header(file).items()}
                self.header |= header
                self.files |= dict.fromkeys(header, file)
                self._prefixes[file] = before

    def tensors(self, names: Iterable[str], device: Device = "cpu") -> dict[str, Tensor]:
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
            with safe_open(file, framework="pt") as tensors:
                before = self._prefixes[file]
                for name in inside:
                    found[name] = upload(tensors.get_tensor(name.removeprefix(before)), device)
        return found

    def stacked(self, site: Site, device: Device = "cpu") -> tuple[Tensor, Tensor | None]:
        """Read a site's linears as one: float32 weight [N, D] and bias [N] or None.

        Raises NumericalError naming the linear whose weights are not finite.
        """
        names = [f"{linear}.weight" for linear in site.linears]
        biases = [f"{linear}.bias" for linear in site.linears] if site.bias else []
        found = self.tensors([*names, *biases], device)
        refuse_not_finite(found)
        self._zero = self._zero or warn_of_zero(found, str(self.folder))
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
        where = device if keep is None else "cpu"
        for name, tensor in self.read(root, names, where, dtype):
            path, _, leaf = name.rpartition(".")
            assign(root.get_submodule(path), leaf, keep(tensor) if keep else tensor)

    def read(
        self, root: nn.Module, names: Iterable[str], device: Device, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """Read the named tensors for ``root`` as :meth:`fill` gives them to it."""
        exact = set(getattr(root, "_keep_in_fp32_modules", None) or ())
        for name, tensor in self._in_turn(names, device):
            if tensor.is_floating_point():
                tensor = tensor.to(torch.float32 if exact & set(name.split(".")) else dtype)
            yield name, tensor

    def _in_turn(self, names: Iterable[str], device: Device) -> Iterator[tuple[str, Tensor]]:
        """Read as :meth:`tensors`, file by file and a hundred at a time."""
        waiting = sorted(names, key=lambda name: str(self.files.get(name)))
        for start in range(0, len(waiting), 100):
            yield from self.tensors(waiting[start : start + 100], device).items()


def refuse_not_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise NumericalError naming the module of the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise NumericalError(
                f"{name.rpartition('.')[0] or name}: the weights hold NaN or infinity; the "
                "checkpoint is damaged, nothing downstream can be right"
            )


def refuse_damaged(files: Iterable[Path]) -> None:
    """Raise NumericalError naming the first tensor of weights files that is not finite.

    A matrix of zeros is a line of the log, one of each file. One tensor is in memory at a time.
    """
    for file in files:
        zero = False
        with open_weights(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                zero = zero or warn_of_zero({name: tensor}, str(file))
                if not is_finite(tensor):
                    raise NumericalError(
                        f"{file}: {name} holds NaN or infinity; the checkpoint is damaged. "
                        "Download it again, or save it anew"
                    )


def is_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds no NaN and no infinity."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if tensor.element_size() == 1:  # of 8-bit floats torch finds no extremes
        tensor = tensor.float()
    return all(bool(end.isfinite()) for end in tensor.aminmax())  # which keep NaN; fast in 16 bits


def warn_of_zero(tensors: Mapping[str, Tensor], where: str) -> bool:
    """Name in the log the first matrix that holds nothing but zeros, and tell whether there is one.

    A download that was cut short leaves zeros, and so do layers that were never trained.
    """
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and tensor.numel() and is_zero(tensor[:1]) and is_zero(tensor):
            log.warning(
                "%s: %s is all zeros, and others may be. A download that was cut short leaves "
                "zeros: look at images of the 16-bit model, and download it again if they are "
                "wrong", where, name,
            )  # fmt: skip
            return True
    return False


def is_zero(tensor: Tensor) -> bool:
    """Tell whether a tensor holds nothing but zeros."""
    tensor = tensor.float() if tensor.element_size() == 1 else tensor
    return not bool(tensor.any())


@contextmanager
def open_weights(file: Path) -> Iterator[Any]:
    """Open a safetensors file, whose header says where the file has to end.

    Raises ArtifactError if the header can't be read or the file isn't as long as it says.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        with file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                raise ArtifactError(
                    f"{file} is a pointer of Git LFS, not the weights: fetch them with `git lfs "
                    "pull` in that folder, or download the model with `hf download`"
                ) from error
        raise ArtifactError(
            f"{file} is damaged or was not written to its end ({error}); {AGAIN}"
        ) from error
    except OSError as error:
        raise ArtifactError(f"{file} can't be read: {error}") from error


def read_header(file: Path) -> Header:
    """Read name, dtype and shape of every tensor, once; ArtifactError as :func:`open_weights`."""
    return _header(file, stamp(file) if file.exists() else None)


def refuse_quantized(header: Header, name: str) -> None:
    """Raise UnsupportedError if weights are stored in fewer than 16 bits, or as complex numbers."""
    for tensor, (dtype, _) in header.items():
        if dtype.startswith("C"):
            raise UnsupportedError(
                f"{name}: {tensor} is stored as complex numbers ({dtype}), of which a transformer "
                "has none; store it as real ones"
            )
        whole = dtype[0] in "IUB" and dtype != "BF16" and tensor.endswith((".weight", ".bias"))
        if whole or dtype.startswith(("F8_", "F6_", "F4")) or dtype in ("I8", "U8", "I4", "U4"):
            raise UnsupportedError(
                f"{name} is already quantized: {tensor} is stored as {dtype} (fp8, int8, nf4 and "
                "other files of fewer than 16 bits have lost what DiRotQ would measure). Compress "
                "the 16-bit model that it was made from"
            )


def weight_files(part: Path, *, diffusers: bool) -> list[Path]:
    """Return the files that will be read of a component, by the rules of its library.

    Raises ArtifactError if there are none, or they do not hold what their index says; ConfigError
    if that is damaged or names something else than safetensors beside it.
    """
    stem = "diffusion_pytorch_model" if diffusers else "model"
    whole, index = part / f"{stem}.safetensors", part / f"{stem}.safetensors.index.json"
    # With both there, diffusers reads the shards and transformers the single file.
    if whole.is_file() and not (diffusers and index.is_file()):
        return [whole]
    if not index.is_file():
        raise ArtifactError(f"has no {whole.name}")
    by_file = collections.defaultdict(set)
    for name, file in weight_map(index).items():
        by_file[file].add(name)
    for file, names in by_file.items():
        if not (part / file).is_file():
            raise ArtifactError(f"lacks {file}, which its {index.name} names")
        held = stored([part / file]).keys()
        if lost := sorted(names - held):
            raise ArtifactError(
                f"has a {index.name} that looks for {named(lost)} in {file}, which is not there"
            )
        if diffusers and (more := sorted(held - names)):
            raise ArtifactError(f"has {named(more)} in {file}, which its {index.name} leaves out")
    return [part / file for file in sorted(by_file)]


def stored(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor in the files, from their headers.

    Raises ArtifactError if a file is truncated, or two of them hold the same tensor.
    """
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, (_, shape) in read_header(file).items():
            if name in found:
                raise ArtifactError(f"holds {name} twice, in {file.name} and in another file")
            found[name] = shape
    return found


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


def named(names: Sequence[str]) -> str:
    """Name one tensor, or the first of several."""
    if len(names) == 1:
        return f"the tensor {names[0]}"
    return f"{len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


@functools.lru_cache(maxsize=256)
def _header(file: Path, _: Stamp | None) -> Header:
    with open_weights(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
        return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
