"""``dirotq.load``: a packed folder as a working diffusers pipeline."""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from dirotq.device import compute_dtype, pick_device
from dirotq.doors import refuse_doors
from dirotq.errors import ArtifactError
from dirotq.pipeline.artifact import MANIFEST, Artifact

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

log = logging.getLogger(__name__)

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
MADE_UP = re.compile("newly initialized|MISSING|MISMATCH|seem corrupted")
"""What diffusers and transformers say when a model has parameters that no file gave it."""


def load(
    folder: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None
) -> "DiffusionPipeline":
    """Load what ``pack`` wrote: a packed folder, or the ``pack`` artifact that holds one.

    device  ``auto``, ``cpu``, ``cuda``, ``cuda:N``
    dtype   of the parts that stay in 16 bits; float32 on a CPU and bfloat16 on a GPU by default

    Raises ArtifactError if the folder holds no packed pipeline, a file is truncated, or a tensor is
    missing, extra, misshapen, not finite or out of its range; UnsupportedError if it was packed by
    a newer format.
    """
    target = pick_device(device)
    return open_pipeline(packed_folder(folder), dtype or compute_dtype(target), target)


def open_pipeline(folder: Path, dtype: torch.dtype, device: torch.device) -> "DiffusionPipeline":
    """A local diffusers folder, packed or not, from safetensors only.

    On a GPU that can't hold all components at once they go there one at a time, as they are used.

    Raises ArtifactError naming the weights file that is truncated or damaged; ConfigError or
    UnsupportedError if the folder would run code or read elsewhere (dirotq/doors.py).
    """
    import diffusers

    from dirotq.completeness import absent, is_packed, refuse_incomplete
    from dirotq.components import DENOISER

    refuse_doors(folder)
    for file in sorted(folder.glob("*/*.safetensors")):
        # Before diffusers and transformers open it, each of which fails in a way of its own.
        check_weights(file)
    packed = is_packed(folder)  # then its quantizer holds the transformer against its config
    refuse_incomplete(
        folder,
        str(folder),
        without=DENOISER if packed else "",
        prompts=not packed,
        error=ArtifactError,
    )
    with quiet() as said:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, **absent(folder)
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


def check_weights(file: str | Path) -> None:
    """Read a safetensors file's header, which says where the file has to end.

    Raises ArtifactError if the header can't be read or the file isn't as long as it says.
    """
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ArtifactError(
            f"{file} is damaged or was not written to its end ({error}); download it again, or "
            "make it again with `dirotq compress`"
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


def packed_folder(folder: str | Path) -> Path:
    """The diffusers folder itself, checked to hold a transformer packed by DiRotQ.

    An artifact of ``pack`` is also held against its digests.
    """
    root = Path(folder).expanduser()
    if (root / MANIFEST).is_file():
        root = Artifact(root.parent.name, root.name, root).tree("model")
    config = root / "transformer" / "config.json"
    if not config.is_file() or not (root / "model_index.json").is_file():
        raise ArtifactError(
            f"{folder} holds no packed pipeline (no model_index.json with a "
            "transformer/config.json below it); give the folder that `dirotq compress` printed"
        )
    packing = json.loads(config.read_text()).get("quantization_config", {})
    if packing.get("quant_method") != "dirotq":
        raise ArtifactError(
            f"{folder} is a diffusers pipeline, but its transformer is not packed by DiRotQ "
            f"(quant_method {packing.get('quant_method')!r}); pack it with "
            f"`dirotq compress model={folder}`"
        )
    return root
