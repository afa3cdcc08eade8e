"""What a file format can say about one linear, and how it says it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dirotq.kernels.buffers import Packed
from dirotq.kernels.formats.spec import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFormat:
    """A format of single linears, as a program outside of DiRotQ reads it.

    ``name``        as files and the command line spell it
    ``reader``      the program that reads such files
    ``misfits``     of a spec: what the format can't say, in words; nothing if it can say all
    ``tensors``     of a packed linear: {name below the layer's: tensor}, without its bias; on the
                    meta device it gives dtypes and shapes
    ``record``      of a spec: the JSON object that describes the layer in the file; None: files of
                    this format hold none
    ``packed_by``   settings of `dirotq compress` whose plans it holds, each in one line, the
                    shortest first
    ``modulators``  how linears with 16-bit activations are written; None: as this format itself
    """

    name: str
    reader: str
    misfits: Callable[[QuantSpec], Iterator[str]]
    tensors: Callable[[Packed, QuantSpec], dict[str, Tensor]]
    record: Callable[[QuantSpec], dict[str, Any]] | None
    packed_by: tuple[str, ...] = ()
    modulators: "LayerFormat | None" = None

    def of(self, spec: QuantSpec) -> "LayerFormat":
        """Return the format that a linear of this spec is written in."""
        return (spec.activations.bits == 16 and self.modulators) or self

    def fits(self, spec: QuantSpec) -> bool:
        """Tell whether nothing of the spec would be lost."""
        return not any(True for _ in self.of(spec).misfits(spec))


def plain_misfits(spec: QuantSpec) -> Iterator[str]:
    """Yield what a format can't say that knows neither rotations nor low-rank branches."""
    if spec.transform.kind == "dense" or spec.transform.block > 1 or spec.transform.smooth:
        yield f"{transform_in_words(spec)} (it has no rotation)"
    if spec.rank:
        yield f"{branch_in_words(spec)} (it has none)"


def transform_in_words(spec: QuantSpec) -> str:
    """Name what the main branch's input goes through."""
    kind, block = spec.transform.kind, spec.transform.block
    matrix = "regular" if kind == "regular" else "Sylvester"
    words = "a dense rotation" if kind == "dense" else f"{matrix} Hadamard blocks of {block}"
    words = "no rotation" if kind != "dense" and block == 1 else words
    return f"smoothing and {words}" if spec.transform.smooth else words


def branch_in_words(spec: QuantSpec) -> str:
    """Name the low-rank branch."""
    if spec.rank == 0:
        return "no low-rank branch"
    place = "taken out of" if spec.branch.kind == "project" else "beside"
    return f"a {spec.branch.bits}-bit low-rank branch of rank {spec.rank} {place} the input"


def weights_in_words(spec: QuantSpec) -> str:
    """Name the number format of the weights."""
    weights = spec.weights
    if weights.element == "e2m1":
        return f"{weights.name} weights"
    size = weights.group_size
    per = "output" if size is None else f"group of {size}"
    return f"{weights.element} weights with one scale per {per}"


def activations_in_words(spec: QuantSpec) -> str:
    """Name the number format of the activations."""
    acts = spec.activations
    if acts.bits == 16:
        return "16-bit activations"
    return f"{acts.element} activations with `{acts.name}` scales"
