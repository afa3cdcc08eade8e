"""The sites of a transformer that no family table describes, read off one forward.

Linears that are handed the same view of the same memory share a site. No number matters, so the
meta device will do: a forward there needs no weights and next to no time, however large the model.
"""

import copy
import functools
import inspect
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from dirotq.errors import UnsupportedError
from dirotq.quiet import quiet

from .call import Call
from .family import Kind, Site, is_linear, is_pointwise
from .skeleton import empty_transformer

SIZE, FRAMES = 256, 25
"""Pixels and frames of a small call: patches divide them (frames but for the first)."""
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
TABLE = "table for it: CONTRIBUTING.md says how (about 40 lines)"


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


def discover(transformer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Discovered:
    """Trace one forward, ``transformer(*args, **kwargs)``, and group what its linears read.

    transformer  on the meta device (all its parameters or some), or real; it is left as it was. A
                 real one holds the inputs of all its linears in memory until the trace ends
    args, kwargs one call's arguments, batch first in the first of them; see ``denoiser_call``

    Linears and 1x1 convolutions of repeated blocks become sites, if their input lies in one block:
    a block is a member of an ``nn.ModuleList`` of one class, with attention in it. What reads one
    row per sample is a modulator.

    Raises UnsupportedError if the forward fails (on the meta device: where control flow depends on
    data), or shows no site.
    """
    name = type(transformer).__name__
    call = Call(args, kwargs)
    if on_meta := any(p.is_meta for p in transformer.parameters()):
        transformer, call = _to_meta(transformer), call.map(lambda t: t.to("meta"))
    trace = _Trace(transformer)
    try:
        trace.run(call)
    except Exception as error:
        where = " on the meta device, where control flow can't depend on data," if on_meta else ""
        advice = "trace it with real weights, or " if on_meta else ""
        raise UnsupportedError(
            f"no family table describes {name}, and one forward of it{where} failed with "
            f"{type(error).__name__}: {error}. To compress it, {advice}write a {TABLE}"
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
        self.parameters = {id(parameter): name for name, parameter in self.root.named_parameters()}
        self.inside: list[str] = []
        self.alive: list[Tensor] = []  # a freed storage's address would be given away again

    def run(self, call: Call) -> None:
        hooks = []
        for name, module in (self.linears | self.members).items():
            enter = lambda _, args, kwargs, name=name: self._enter(name, args, kwargs)  # noqa: E731
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._leave))
        try:
            with torch.no_grad(), self:
                self.root(*call.args, **call.kwargs)
        finally:
            self.alive.clear()
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inside.append(name)
        if name in self.members:
            self.calls.add(name)
        if name in self.linears:
            x = args[0] if args else next(iter(kwargs.values()))
            self.alive.append(x)
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
        read = [self.parameters[id(value)] for value in given if id(value) in self.parameters]
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
        """Groups of linears that read the same, block by block."""
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
        for (block, traits, *_), consumers in groups.items():
            path = self._path(block, consumers, pointwise=traits[2])
            if path is None:
                kept |= dict.fromkeys(consumers, HOMELESS)
                continue
            rows, dims = zip(*(self.linears[c].weight.shape[:2] for c in consumers), strict=True)
            sites.append(Site(path, tuple(consumers), dims[0], rows, *traits))
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
        """Why a linear stays in 16 bits, seen on its own."""
        block = _block(name)
        exact = set(getattr(self.root, "_keep_in_fp32_modules", None) or ())
        if block not in self.calls:
            return OUTSIDE
        if block.rpartition(".")[0] not in self.mixing:
            return UNMIXED
        if name in self.bypassed:
            return BYPASSED
        if not self.reads[name]:
            return UNCALLED
        return EXACT if exact & set(name.split(".")) else None

    def _path(self, block: str, consumers: list[str], *, pointwise: bool) -> str | None:
        """Where the site's module goes: beside its consumers, or in the place of the only one."""
        if len(consumers) == 1 and not pointwise:
            return consumers[0]
        parent = _common(consumer.rpartition(".")[0] for consumer in consumers)
        while isinstance(self.root.get_submodule(parent), CONTAINERS):
            # A container runs, counts or iterates over what is put into it.
            parent = parent.rpartition(".")[0]
        if not f"{parent}.".startswith(f"{block}."):
            return None
        below = [consumer[len(parent) + 1 :].replace(".", "_") for consumer in consumers]
        leaf = "_".join(["shared", *below])
        while hasattr(self.root.get_submodule(parent), leaf):
            leaf += "_"
        return f"{parent}.{leaf}"


def _view(x: Tensor) -> View:
    # A write in place makes another activation of the same memory.
    version = 0 if x.is_inference() else x._version
    return x.untyped_storage()._cdata, version, int(x.storage_offset()), tuple(x.shape), x.stride()


def _block(name: str) -> str:
    return Site("", (name,), 0, (), "block", False).block


def _pattern(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _common(paths: Iterable[str]) -> str:
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _to_meta(transformer: nn.Module) -> nn.Module:
    """A copy without memory: buffers too, and tensors that modules hold as plain attributes."""
    twin = copy.deepcopy(transformer).to("meta")
    for module in twin.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, value.to("meta"))
    return twin


def _batch(transformer: Any, call: Call) -> int:
    """Samples of a call: the length of its first argument, a tensor or a list of them."""
    names = [n for n in inspect.signature(transformer.forward).parameters if n in call.kwargs]
    return len((*call.args, *(call.kwargs[n] for n in names), *call.kwargs.values())[0])


def denoiser_call(folder: Path, **arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a pipeline's first denoiser call: float32, on the CPU.

    The denoiser is never loaded. Text encoders run on the meta device and hand zeros to the
    pipeline; where that fails they are loaded and run on the CPU.

    folder     a diffusers folder; of its weights only the encoders' are read, if any
    arguments  of the pipeline's call, beside the prompt: they win over the smallest sensible ones

    Raises UnsupportedError if the pipeline stops before its denoiser either way.
    """
    failures = []
    for weights in (False, True):
        try:
            with quiet():
                pipe = _pipeline_without_denoiser(folder, weights)
                pipe.transformer.register_forward_pre_hook(_stop, with_kwargs=True)
                pipe(**_smallest(pipe) | arguments)
            failures.append("it ended without a call of its transformer")
        except _Reached as reached:
            return reached.call.args, reached.call.kwargs
        except Exception as error:  # noqa: BLE001  any line of a foreign pipeline
            failures.append(f"{type(error).__name__}: {error}")
    raise UnsupportedError(
        f"{folder}: no family table describes this pipeline, and a call of it to see its "
        f"denoiser's arguments failed. With encoders on the meta device: {failures[0]}. With their "
        f"weights on the CPU: {failures[1]}. Pass the call what it lacks, or write a {TABLE}"
    )


class _Reached(BaseException):
    """The denoiser's arguments on their way out; no pipeline catches a BaseException."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def _stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # One precision throughout: encoders may have run in another than the denoiser's float32.
    raise _Reached(Call(args, kwargs).map(lambda t: t.float() if t.is_floating_point() else t))


def _pipeline_without_denoiser(folder: Path, weights: bool) -> Any:
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    cls: Any = getattr(diffusers, index["_class_name"])
    # Pipelines ask their first module for the device, which would be the meta device.
    cpu = property(lambda _: torch.device("cpu"))
    cls = type(cls.__name__, (cls,), {"device": cpu, "_execution_device": cpu})
    parts = {
        name: index[name] for name in inspect.signature(cls.__init__).parameters if name in index
    }
    for name, part in parts.items():
        if isinstance(part, list):  # not an option of the pipeline
            parts[name] = _component(folder / name, part, weights)
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _component(path: Path, entry: list[str | None], weights: bool) -> Any:
    """A component of model_index.json: a model without weights if it can be, others as they are."""
    import accelerate
    import diffusers
    import transformers

    library, name = entry
    if not (library and name):
        return None
    known = {"diffusers": diffusers, "transformers": transformers}
    # Some pipelines bring an encoder of their own, and name themselves as its library.
    cls = getattr(known.get(library) or getattr(diffusers.pipelines, library), name)
    if not issubclass(cls, nn.Module):
        return cls.from_pretrained(path, local_files_only=True)
    denoiser = path.name.startswith("transformer")
    if weights and not denoiser:
        options = {"use_safetensors": True, "local_files_only": True}
        return cls.from_pretrained(path, dtype=torch.bfloat16, **options).eval()
    if hasattr(cls, "load_config"):
        model = empty_transformer(cls.load_config(path), cls)
    else:
        with accelerate.init_empty_weights():
            model = cls(cls.config_class.from_pretrained(path)).eval()
        model.set_attn_implementation("eager")  # others look at the mask's values
    return model if denoiser else _shapes_only(model.to("meta"))


def _shapes_only(model: Any) -> Any:
    """Let a model on the meta device be called from the CPU: zeros come out."""
    forward = model.forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs).map(lambda t: t.to("meta"))
        zeros = lambda t: torch.zeros(t.shape, dtype=t.dtype)  # noqa: E731
        return tree_map_only(Tensor, zeros, forward(*call.args, **call.kwargs))

    model.forward = run
    return model


def _smallest(pipe: Any) -> dict[str, Any]:
    """Arguments of the cheapest call, of those that the pipeline takes."""
    from PIL import Image

    takes = inspect.signature(pipe.__call__).parameters
    wanted: dict[str, Any] = {"prompt": "a photo", "height": SIZE, "width": SIZE}
    wanted |= {"num_frames": FRAMES, "num_inference_steps": 2}  # the last may skip its denoiser
    if "image" in takes and takes["image"].default is inspect.Parameter.empty:
        wanted["image"] = Image.new("RGB", (SIZE, SIZE))
    return {name: value for name, value in wanted.items() if name in takes}
