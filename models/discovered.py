"""Sites of a transformer that no table describes: from one traced forward, without weights."""

import functools
import logging
from pathlib import Path
from typing import Any

from .discovery import denoiser_call, discover
from .family import Site
from .skeleton import empty_transformer

log = logging.getLogger(__name__)


@functools.lru_cache(maxsize=8)
def discovered_sites(
    folder: Path, transformer_class: str, call: tuple[tuple[str, Any], ...]
) -> tuple[Site, ...]:
    """The sites of a pipeline's transformer, traced once per process, without weights.

    call  the pipeline's arguments, as sorted items

    Raises UnsupportedError with the reason if the forward can't be traced (models/discovery.py).
    """
    import diffusers  # takes seconds, and most models have a table

    args, kwargs = denoiser_call(folder, **dict(call))
    cls = getattr(diffusers, transformer_class)
    skeleton = empty_transformer(cls.load_config(folder / "transformer"), cls)
    found = discover(skeleton, args, kwargs)
    for note in found.notes:
        log.info("discovery: %s", note)
    return tuple(found.sites)
