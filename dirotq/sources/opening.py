"""A diffusers folder, packed or not, as a pipeline in memory."""

import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dirotq.device import dtype_name
from dirotq.errors import ArtifactError, DirotqError, UnsupportedError
from dirotq.files.json_file import INDEX, components, read_json
from dirotq.models.autoencoders import precision
from dirotq.quiet import heed, quiet

from .calls import pipeline_class
from .doors import refuse_doors, refuse_sizes
from .hub import first_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)

ONE_BY_ONE = ("AutoencoderKLHunyuanVideo15",)
"""Autoencoders whose attention fails for a batch, in diffusers 0.42.1: its mask broadcasts over one
sample alone. In slices they decode any number."""
SHARE = 0.8
"""Of free memory, what weights may take: the rest is for what they compute."""


def open_pipeline(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    variant: str | None = None,
    given: Mapping[str, Any] | None = None,
    offloading: str | None = None,
) -> "DiffusionPipeline":
    """Open a local diffusers folder, packed or not, from safetensors only.

    On a GPU that can't hold all components at once they go there one at a time, as they are used;
    one that can't hold the largest gets them layer by layer.
    ``variant`` is that of the files, where a component has it; ``given`` are components that take
    the places of the folder's. ``offloading`` says what waits in host memory: ``none``, components
    (``model``) or layers (``group``); None leaves it to the GPU's free memory.

    Raises ArtifactError naming what is damaged or incomplete; ConfigError or UnsupportedError if
    the folder would run code or read elsewhere, or needs packages that are not here.
    """
    from dirotq.sources.completeness import packed_parts, refuse_incomplete

    with explained(folder):
        refuse_doors(folder)
        # Before diffusers and transformers open a file, each of which fails in a way of its own.
        refuse_sizes(folder)
        packed = packed_parts(folder)  # their quantizer holds them against their config
        refuse_incomplete(
            folder,
            str(folder),
            weights=variant is None,  # of a variant, what is missing is told by `heed`
            without=packed,
            prompts=not packed,
            error=ArtifactError,
        )
        pipe = read_pipeline(folder, dtype, variant=variant, given=given)
    if offloading is None:
        offloading = _offloading(pipe, device)
        if offloading != "none":
            what = {"model": "components take turns", "group": "layers take turns"}[offloading]
            log.info("the pipeline's %s on %s, which can't hold all", what, device)
    place(pipe, device, offloading)
    return pipe


def read_pipeline(
    folder: Path,
    dtype: torch.dtype,
    *,
    variant: str | None = None,
    given: Mapping[str, Any] | None = None,
) -> "DiffusionPipeline":
    """Read a folder that was checked into host memory; arguments as of :func:`open_pipeline`."""
    import diffusers

    from dirotq.sources.completeness import absent

    # A component that the pipeline's class calls optional, as Wan's transformers, is read although
    # it is given, unless the class itself reads the folder (diffusers 0.42.1).
    own = pipeline_class(read_json(folder / INDEX)) if given else None
    with quiet() as said:
        pipe = (own or diffusers.DiffusionPipeline).from_pretrained(
            folder,
            dtype=dtypes(folder, dtype),
            use_safetensors=True,
            local_files_only=True,
            variant=variant,
            **absent(folder),
            **(given or {}),
        )
    heed(said)
    pipe.set_progress_bar_config(disable=True)
    if type(getattr(pipe, "vae", None)).__name__ in ONE_BY_ONE:
        pipe.vae.use_slicing = True
    return pipe


def dtypes(folder: Path, dtype: torch.dtype) -> torch.dtype | dict[str, torch.dtype]:
    """Return what ``from_pretrained`` is told: a dtype for all, or one for the autoencoder too."""
    _, name = components(read_json(folder / INDEX)).get("vae", ("", ""))
    wanted = precision(name, dtype)
    if wanted == dtype:
        return dtype
    log.info("the %s computes in %s, which it needs", name, dtype_name(wanted))
    return {"default": dtype, "vae": wanted}


def place(pipe: "DiffusionPipeline", device: torch.device, offloading: str) -> None:
    """Put a pipeline on a device, or let what :func:`open_pipeline` says come there in turn."""
    if offloading == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offloading == "group":
        pipe.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
            use_stream=device.type == "cuda",
        )
    else:
        pipe.to(device)


def _offloading(pipe: "DiffusionPipeline", device: torch.device) -> str:
    if device.type != "cuda":
        return "none"
    sizes, room = component_bytes(pipe), torch.cuda.mem_get_info(device)[0] * SHARE
    if sum(sizes) <= room:
        return "none"
    return "model" if max(sizes) <= room else "group"


def component_bytes(pipe: "DiffusionPipeline") -> list[int]:
    """Return what the weights of each component of a pipeline take."""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return list(map(module_bytes, modules))


def module_bytes(module: torch.nn.Module) -> int:
    """Return what the weights of a module take, or will take if they are on the meta device."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


@contextmanager
def explained(folder: str | Path) -> Iterator[None]:
    """Turn whatever libraries raise while they read a folder into an error of this project.

    Out of memory stays what it is, with a note on what to do.
    """
    try:
        yield
    except (DirotqError, GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        error.add_note(
            f"while loading {folder}: use device='cpu', another GPU, or dtype=torch.bfloat16"
        )
        raise
    except ImportError as error:
        raise UnsupportedError(
            f"{_place(folder, error)} needs a package that is not installed here: "
            f"{first_line(error)}"
        ) from error
    except BaseException as error:  # tokenizers' panics are no Exceptions
        raise ArtifactError(
            f"{_place(folder, error)} can't be loaded ({type(error).__name__}: "
            f"{first_line(error)}): a file is missing or damaged, or was written for another "
            "version of diffusers or transformers. Download the folder again, or make it again "
            "with `dirotq compress`"
        ) from error


def _place(folder: str | Path, error: BaseException) -> str:
    """Name the component that diffusers was loading, if it was, and the folder."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [f.f_locals.get("name") for f in frames if f.f_code.co_name == "load_sub_model"]
    return f"the component {names[-1]} of {folder}" if names else str(folder)
