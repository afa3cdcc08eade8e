"""The arguments that a pipeline hands its denoiser, seen without the denoiser's weights."""

import functools
import inspect
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from dirotq.errors import UnsupportedError
from dirotq.quiet import quiet

from .call import Call
from .family import TABLE
from .hollow import Cheaply, hollow
from .pipeline_images import pictures_needed
from .skeleton import empty_transformer

SIZE, FRAMES = 256, 25
"""Pixels and frames of a small call: patches divide them (frames but for the first)."""


NONE, NOISE, LOADED = "on the meta device", "with noise for weights", "loaded"
WEIGHTS = NONE, NOISE, LOADED
"""Of encoders, the cheapest first."""


def denoiser_call(
    folder: Path, *, load_encoders: bool = True, **arguments: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments of a pipeline's first denoiser call, float32, CPU.

    The denoiser is never loaded. Text encoders run on the meta device and hand zeros to the
    pipeline; where that fails, they and the autoencoder run on the CPU with noise for weights
    (models/hollow.py); where that fails too, they are loaded.

    folder         a diffusers folder; of its weights only the encoders' are read, if any
    load_encoders  whether they may be
    arguments      of the pipeline's call: they win over the smallest sensible ones

    Raises UnsupportedError if the pipeline stops before its denoiser each time.
    """
    failures = []
    for weights in WEIGHTS if load_encoders else WEIGHTS[:-1]:
        try:
            with quiet(), Cheaply() if weights == NOISE else nullcontext():
                pipe = pipeline_without_denoiser(folder, weights)
                pipe.transformer.register_forward_pre_hook(_stop, with_kwargs=True)
                pipe(**smallest(pipe) | arguments)
            failures.append("it ended without a call of its transformer")
        except _Reached as reached:
            return reached.call.args, reached.call.kwargs
        except Exception as error:  # noqa: BLE001  any line of a foreign pipeline
            failures.append(f"{type(error).__name__}: {error}")
    tried = ". ".join(f"With encoders {w}: {f}" for w, f in zip(WEIGHTS, failures, strict=False))
    raise UnsupportedError(
        f"{folder}: no family table describes this pipeline, and a call of it to see its "
        f"denoiser's arguments failed. {tried}. "
        f"Pass the call what it lacks, or write a {TABLE}"
    )


class _Reached(BaseException):
    """The denoiser's arguments on their way out; no pipeline catches a BaseException."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call


def _stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # One precision throughout: encoders may have run in another than the denoiser's float32.
    raise _Reached(Call(args, kwargs).map(lambda t: t.float() if t.is_floating_point() else t))


def pipeline_without_denoiser(folder: Path, weights: str) -> Any:
    """Make a pipeline of a folder, its denoisers on the meta device.

    weights  one of :data:`WEIGHTS`, for all other models
    """
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
        if _is_component(part):
            parts[name] = _component(folder / name, part, weights)
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _is_component(entry: Any) -> bool:
    """Tell [library, class] from an option of the pipeline, which may be a list of numbers."""
    match entry:
        case [None | str(), None | str()]:
            return True
    return False


def _component(path: Path, entry: list[str | None], weights: str) -> Any:
    """Load a component of model_index.json: a model without weights if it can be, others whole."""
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
    denoiser = "transformer" in path.name
    if weights == LOADED and not denoiser:
        options = {"use_safetensors": True, "local_files_only": True}
        return cls.from_pretrained(path, dtype=torch.bfloat16, **options).eval()
    if hasattr(cls, "load_config"):
        model = empty_transformer(cls.load_config(path), cls)
    else:
        with accelerate.init_empty_weights():
            # Parts of it take the precision that the config notes; here there is one for all.
            model = cls(cls.config_class.from_pretrained(path)).float().eval()
        model.set_attn_implementation("eager")  # others look at the mask's values
    if denoiser:
        return model
    return hollow(model) if weights == NOISE else _shapes_only(model.to("meta"))


def _shapes_only(model: Any) -> Any:
    """Let a model on the meta device be called from the CPU: zeros come out.

    Where it looks at the values of its mask, it is called without: no shape depends on them.
    """
    forward = model.forward
    names = inspect.signature(forward).parameters

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs).map(lambda t: t.to("meta"))
        zeros = lambda t: torch.zeros(t.shape, dtype=t.dtype)  # noqa: E731
        try:
            made = forward(*call.args, **call.kwargs)
        except RuntimeError:
            named = dict(zip(names, call.args)) | call.kwargs
            made = forward(**{k: v for k, v in named.items() if k != "attention_mask"})
        return tree_map_only(Tensor, zeros, made)

    model.forward = run
    return model


def smallest(pipe: Any) -> dict[str, Any]:
    """Choose arguments of the cheapest call, of those that the pipeline takes."""
    from PIL import Image

    takes = inspect.signature(pipe.__call__).parameters
    wanted: dict[str, Any] = {"prompt": "a photo", "height": SIZE, "width": SIZE}
    wanted |= {"num_frames": FRAMES, "num_inference_steps": 2}  # the last may skip its denoiser
    wanted |= {name: Image.new("RGB", (SIZE, SIZE)) for name in pictures_needed(type(pipe))}
    return {name: value for name, value in wanted.items() if name in takes}
