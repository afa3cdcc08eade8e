"""The sites of a transformer that no family table describes, read off one forward.

Linears that are handed the same view of the same memory share a site. No number of a weight
matters: the network that runs is a hollow one (models/hollow.py), however large the model.
"""

import functools
import inspect
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dirotq.errors import UnsupportedError

from .call import Call
from .denoiser_call import denoiser_call
from .family import TABLE, Kind, Site, is_linear, is_pointwise
from .hollow import Cheaply, hollow
from .skeleton import empty_transformer

log = logging.getLogger(__name__)

View = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]
"""Some memory as one linear reads it: storage, writes to it so far, offset, shape, stride."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
PRODUCTS = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "einsum"}
MIXES = {"scaled_dot_product_attention", "softmax", "baddbmm", *PRODUCTS} - {"linear"}
"""Functions that, between activations, carry something from token to token."""

OUTSIDE = "lies outside of the repeated blocks"
UNMIXED = "lies in a stack without attention, which prepares an input of the blocks"
UNCALLED = "is not called in the traced forward, so it sees no token to calibrate with"
BYPASSED = "its weight is read without calling it, which a packed linear has no answer to"
ACROSS = "reads a tensor that several blocks read (text: few tokens, the same at every step)"
EXACT = "the model asks to keep it in float32"
HOMELESS = "the block is a bare container, with no place for what its linears share"
PARAMETER = "is multiplied as a bare parameter, without a linear around it"


@dataclass(frozen=True, slots=True)
class Discovered:
    """``sites`` in the order of the modules; ``kept``: why each other linear stays in 16 bits.

    No site is marked as ``text``: which tokens a model masks is for a family table to say.
    """

    sites: list[Site]
    kept: dict[str, str]
    """By path: of linears, and of parameters that are multiplied without one."""

    @property
    def notes(self) -> list[str]:
        """One sentence for each kind of linear inside of the blocks that stays in 16 bits."""
        counts = Counter((_pattern(n), why) for n, why in self.kept.items() if why != OUTSIDE)
        return [f"{name} ({n}) stays in 16 bits: {why}" for (name, why), n in counts.items()]


@functools.lru_cache(maxsize=8)
def discovered(
    folder: Path, transformer_class: str, call: tuple[tuple[str, Any], ...]
) -> Discovered:
    """Discover the sites of a pipeline's transformer, traced once per process, without weights.

    call  the pipeline's arguments, as sorted items

    Raises UnsupportedError with the reason if the forward can't be traced.
    """
    import diffusers  # takes seconds, and most models have a table

    cls = getattr(diffusers, transformer_class)
    skeleton = empty_transformer(cls.load_config(folder / "transformer"), cls)
    found = discover(skeleton, *denoiser_call(folder, **dict(call)))
    for note in found.notes:
        log.info("discovery: %s", note)
    return found


def discover(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Discovered:
    """Trace one forward, ``transformer(*args, **kwargs)``, and group what its linears read.

    transformer  real, or on the meta device (all its parameters or some): it is left as it was
    args, kwargs one call's arguments, batch first in the first of them; see ``denoiser_call``

    Linears and 1x1 convolutions of repeated blocks become sites, if their input lies in one block:
    a block is a member of an ``nn.ModuleList`` of one class, with attention in it. What reads one
    row per sample is a modulator.

    Raises UnsupportedError if the forward fails, or shows no site.
    """
    name, call = type(transformer).__name__, Call(args, kwargs).on(torch.device("cpu"))
    trace = _Trace(hollow(transformer))
    try:
        trace.run(call)
    except Exception as error:
        raise UnsupportedError(
            f"no family table describes {name}, and one forward of it with noise for weights "
            f"failed with {type(error).__name__}: {error}. To compress it, write a {TABLE}"
        ) from error
    found = trace.discovered(_batch(transformer, call))
    if not found.sites:
        reasons = Counter(found.kept.values()).most_common()
        raise UnsupportedError(
            f"no family table describes {name}, and one forward of it shows no linear to quantize: "
            + "; ".join(f"{count} of {len(found.kept)}: {why}" for why, count in reasons)
            + f". To compress it, write a {TABLE}"
        )
    return found


@dataclass(eq=False)
class _Trace(TorchFunctionMode):
    """Watches one forward: what each linear reads, what runs in which block, what goes around."""

    root: Any
    reads: dict[str, list[View]] = field(default_factory=lambda: defaultdict(list))
    calls: set[str] = field(default_factory=set)
    """Members of module lists that were called."""
    mixing: set[str] = field(default_factory=set)
    """Module lists, some member of which multiplies activations with each other."""
    products: dict[str, None] = field(default_factory=dict)
    """Bare parameters that were multiplied, in order."""
    bypassed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()
        modules: dict[str, Any] = dict(self.root.named_modules())
        self.linears = {name: m for name, m in modules.items() if is_linear(m)}
        lists = {name: m for name, m in modules.items() if isinstance(m, nn.ModuleList)}
        self.members = {
            f"{name}.{number}": member
            for name, members in lists.items()
            for number, member in enumerate(members)
            if len({type(m) for m in members}) == 1
        }
        # By storage: a slice of a parameter, or its transpose, is the parameter.
        self.parameters = {_storage(p): name for name, p in self.root.named_parameters()}
        self.inside: list[str] = []
        # The address of a storage is not given away again while someone points at it, be it weakly.
        self.known: list[StorageWeakRef] = []

    def run(self, call: Call) -> None:
        hooks = []
        for name, module in (self.linears | self.members).items():
            enter = lambda _, args, kwargs, name=name: self._enter(name, args, kwargs)  # noqa: E731
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leave))
        try:
            with torch.no_grad(), Cheaply(), self:
                self.root(*call.args, **call.kwargs)
        finally:
            self.known.clear()
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inside.append(name)
        if name in self.members:
            self.calls.add(name)
        if name in self.linears:
            x = args[0] if args else next(iter(kwargs.values()))
            self.known.append(StorageWeakRef(x.untyped_storage()))
            self.reads[name].append(_view(x))

    def _leave(self, *_: Any) -> None:
        self.inside.pop()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if not isinstance(result, Tensor):  # a dtype or a shape: nothing was computed
            return result
        given = [*args, *(kwargs or {}).values()]
        given += [inner for value in given if isinstance(value, list | tuple) for inner in value]
        storages = [_storage(value) for value in given if isinstance(value, Tensor)]
        read = [self.parameters[key] for key in storages if key in self.parameters]
        for parameter in read:
            module = parameter.rpartition(".")[0]
            if module in self.linears:
                if not self.inside or self.inside[-1] != module:
                    self.bypassed.add(module)
            elif name in PRODUCTS:
                self.products[parameter] = None
        if name in MIXES and not read and self.inside:
            self.mixing |= {member.rpartition(".")[0] for member in self.inside}
        return result

    def discovered(self, batch: int) -> Discovered:
        """Group the linears that read the same, block by block."""
        kinds = self._kinds(batch)
        unfit = {name: self._unfit(name) for name in self.linears}
        kept = {name: why for name, why in unfit.items() if why is not None}
        fit = [name for name in self.linears if name not in kept]
        readers: dict[View, set[str]] = defaultdict(set)
        for name in fit:
            for view in self.reads[name]:
                readers[view].add(_block(name))
        groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for name in fit:
            kind, views, linear = kinds[_pattern(name)], self.reads[name], self.linears[name]
            if kind == "block" and any(len(readers[view]) > 1 for view in views):
                kept[name] = ACROSS
            else:
                traits = (kind, linear.bias is not None, is_pointwise(linear))
                groups[_block(name), traits, *views].append(name)
        sites: list[Site] = []
        for (block, traits, *_), names in groups.items():
            path = self._path(block, names, pointwise=traits[2])
            if path is None:
                kept |= dict.fromkeys(names, HOMELESS)
                continue
            rows, dims = zip(*(self.linears[name].weight.shape[:2] for name in names), strict=True)
            sites.append(Site(path, tuple(names), dims[0], rows, *traits))
        return Discovered(sites, kept | dict.fromkeys(self.products, PARAMETER))

    def _kinds(self, batch: int) -> dict[str, Kind]:
        """By pattern, not by linear: an expert that sees one token is no modulator."""
        most: dict[str, int] = Counter()
        for name, linear in self.linears.items():
            for view in self.reads[name]:
                rows = math.prod(view[3]) // linear.weight.shape[1]
                most[_pattern(name)] = max(most[_pattern(name)], rows)
        patterns = {_pattern(name) for name in self.linears}
        return {name: "modulator" if most[name] <= batch else "block" for name in patterns}

    def _unfit(self, name: str) -> str | None:
        """Say why a linear stays in 16 bits, seen on its own; None if it needn't."""
        block = _block(name)
        exact = set(getattr(self.root, "_keep_in_fp32_modules", None) or ())
        if block not in self.calls:
            return UNCALLED if block in self.members and not self.reads[name] else OUTSIDE
        if block.rpartition(".")[0] not in self.mixing:
            return UNMIXED
        if name in self.bypassed:
            return BYPASSED
        if not self.reads[name]:
            return UNCALLED
        return EXACT if exact & set(name.split(".")) else None

    def _path(self, block: str, names: list[str], *, pointwise: bool) -> str | None:
        """Say where the site's module goes: beside its linears, or in the place of the only one."""
        if len(names) == 1 and not pointwise:
            return names[0]
        parent = _common(name.rpartition(".")[0] for name in names)
        while isinstance(self.root.get_submodule(parent), CONTAINERS):
            # A container runs, counts or iterates over what is put into it.
            parent = parent.rpartition(".")[0]
        if not f"{parent}.".startswith(f"{block}."):
            return None
        below = [name[len(parent) + 1 :].replace(".", "_") for name in names]
        leaf = "_".join(["shared", *below])
        while hasattr(self.root.get_submodule(parent), leaf):
            leaf += "_"
        return f"{parent}.{leaf}"


def _storage(x: Tensor) -> int:
    try:
        return int(x.untyped_storage()._cdata)
    except NotImplementedError:  # sparse, or one of many in torch.vmap
        return 0


def _view(x: Tensor) -> View:
    # A write in place makes another activation of the same memory.
    version = 0 if x.is_inference() else x._version
    return _storage(x), version, int(x.storage_offset()), tuple(x.shape), x.stride()


def _block(name: str) -> str:
    return Site("", (name,), 0, (), "block", False).block


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _common(paths: Iterable[str]) -> str:
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _batch(transformer: Any, call: Call) -> int:
    """Count samples of a call: the length of what is denoised, a tensor or a list of them.

    It is the first argument with numbers in it that are no indices.
    """
    names = [n for n in inspect.signature(transformer.forward).parameters if n in call.kwargs]
    for given in (*call.args, *(call.kwargs[n] for n in names), *call.kwargs.values()):
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        if floats:
            plain = isinstance(given, list) and all(isinstance(one, Tensor) for one in given)
            return len(given if plain else floats[0])
    return 1
