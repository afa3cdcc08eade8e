"""``dirotq.load``: a packed folder as a working diffusers pipeline."""

import logging
import re
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dirotq.device import compute_dtype, pick_device
from dirotq.doors import refuse_doors
from dirotq.errors import ArtifactError, ConfigError, DirotqError, UnsupportedError
from dirotq.packed_folder import check_weights, held, packed_folder, refuse_sizes, variant_of
from dirotq.sums import unchecked

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["check_weights", "component_bytes", "heed", "load", "open_pipeline", "quiet"]

log = logging.getLogger(__name__)

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
MADE_UP = re.compile("newly initialized|MISSING|MISMATCH|seem corrupted")
"""What diffusers and transformers say when a model has parameters that no file gave it."""


def load(
    folder: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    verify: bool = True,
) -> "DiffusionPipeline":
    """Load what ``pack`` wrote: a packed folder, or the ``pack`` artifact that holds one.

    device   ``auto``, ``cpu``, ``cuda``, ``cuda:N``
    dtype    of the parts that stay in 16 bits; float32 on a CPU and bfloat16 on a GPU by default
    variant  of the files, as ``save_pretrained(variant=...)`` named them; the only one by default
    verify   hold every file that is read against the digests in the folder (SHA256SUMS) first:
             once per process, in threads; False for a folder that was changed on purpose

    Raises ConfigError for arguments of another kind; ArtifactError if the folder holds no packed
    pipeline, a file of it changed, is missing or damaged, or a tensor is missing, extra, misshapen,
    not finite or out of its range; UnsupportedError if it was packed by a newer format, or needs
    code or packages that are not here. Running out of memory is told by Python's and torch's own
    errors.
    """
    target = pick_device(str(device))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r:.60}; use torch.bfloat16, float16 or float32")
    with explained(folder), held(folder):
        root = packed_folder(folder, verify=verify)
        with unchecked():  # done, or not wanted
            return open_pipeline(
                root, dtype or compute_dtype(target), target, variant=variant_of(root, variant)
            )


def open_pipeline(
    folder: Path, dtype: torch.dtype, device: torch.device, *, variant: str | None = None
) -> "DiffusionPipeline":
    """A local diffusers folder, packed or not, from safetensors only.

    On a GPU that can't hold all components at once they go there one at a time, as they are used.

    variant  of the files, where a component has it

    Raises ArtifactError naming the file or component that is damaged or incomplete; ConfigError or
    UnsupportedError if the folder would run code or read elsewhere (dirotq/doors.py), or needs
    packages that are not here.
    """
    import diffusers

    from dirotq.completeness import absent, is_packed, refuse_incomplete
    from dirotq.components import DENOISER

    with explained(folder):
        refuse_doors(folder)
        # Before diffusers and transformers open a file, each of which fails in a way of its own.
        refuse_sizes(folder)
        packed = is_packed(folder)  # then its quantizer holds the transformer against its config
        refuse_incomplete(
            folder,
            str(folder),
            weights=variant is None,  # of a variant, what is missing is told by `heed`
            without=DENOISER if packed else "",
            prompts=not packed,
            error=ArtifactError,
        )
        with quiet() as said:
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                variant=variant,
                **absent(folder),
            )
        heed(said)
    pipe.set_progress_bar_config(disable=True)
    if device.type == "cuda" and component_bytes(pipe) > torch.cuda.mem_get_info(device)[0] * 0.8:
        log.info("the pipeline's components take turns on %s, which can't hold all of them", device)
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def component_bytes(pipe: "DiffusionPipeline") -> int:
    """What the weights of all components of a pipeline take."""
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def explained(folder: str | Path) -> Iterator[None]:
    """Turn whatever libraries raise while they read a folder into an error of this project.

    Out of memory stays what it is, with a note on what to do.
    """
    try:
        yield
    except DirotqError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        error.add_note(
            f"while loading {folder}: use device='cpu', another GPU, or dtype=torch.bfloat16"
        )
        raise
    except ImportError as error:
        raise UnsupportedError(
            f"{_place(folder, error)} needs a package that is not installed here: {_first(error)}"
        ) from error
    except (GeneratorExit, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers' panics are no Exceptions
        raise ArtifactError(
            f"{_place(folder, error)} can't be loaded ({type(error).__name__}: {_first(error)}): a "
            "file is missing or damaged, or was written for another version of diffusers or "
            "transformers. Download the folder again, or make it again with `dirotq compress`"
        ) from error


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Keep diffusers' and transformers' bars and notices off the screen; their warnings, collected.

    What they warn of while a model is loaded is for :func:`heed`.
    """
    import diffusers
    import transformers

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [
        (library.get_verbosity(), library.is_progress_bar_enabled(), logger.handlers)
        for library, logger in zip(libraries, loggers, strict=True)
    ]
    said = _Collected()
    for library, logger in zip(libraries, loggers, strict=True):
        library.set_verbosity_warning()
        library.disable_progress_bar()
        logger.handlers = [said]
    try:
        yield said.messages
    finally:
        for library, logger, (level, bars, handlers) in zip(
            libraries, loggers, before, strict=True
        ):
            library.set_verbosity(level)
            logger.handlers = handlers
            if bars:
                library.enable_progress_bar()


class _Collected(logging.Handler):
    """A handler that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def heed(said: Iterable[str]) -> None:
    """Go through the warnings of a load: ArtifactError if weights were made up, others are shown.

    Files were held against their classes before (dirotq/completeness.py): this is the loaders' own
    word on it.
    """
    for message in said:
        plain = " ".join(ESCAPES.sub("", message).split())
        if MADE_UP.search(plain):
            raise ArtifactError(
                f"weights are missing, and the loader made some up: {plain[:600]}. Download the "
                "model again"
            )
        log.warning("%s", plain)


def _place(folder: str | Path, error: BaseException) -> str:
    """The component that diffusers was loading, if it was, and the folder."""
    names: list[Any] = [
        frame.f_locals.get("name")
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "load_sub_model"
    ]
    return f"the component {names[-1]} of {folder}" if names else str(folder)


def _first(error: BaseException) -> str:
    """The first line of an error that says something, cut."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0]:.300}" if lines else "no message"
