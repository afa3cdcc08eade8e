"""What diffusers does to whole pipelines, made right for those around a packed transformer.

Its classes are wrapped once, when diffusers' pipelines are imported (dirotq/_registration.py); of
other pipelines nothing changes.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from dirotq.packed.beside import complete
from dirotq.packed.guards import casting, is_packed


def _saying(cast: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(cast)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        token = casting.set(True)
        try:
            return cast(self, *args, **kwargs)
        finally:
            casting.reset(token)

    return to


def _completing(save: Callable[..., Any]) -> Callable[..., Any]:
    """diffusers writes components and their index; the rest of a packed folder is ours."""

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        saved = save(self, save_directory, *args, **kwargs)
        if is_packed(getattr(self, "transformer", None)):
            complete(self, Path(save_directory), Path(save_directory).resolve().name)
        return saved

    return save_pretrained


def _completed(upload: Callable[..., Any]) -> Callable[..., Any]:
    """Both ways to the Hub write a card of diffusers' own just before."""

    @functools.wraps(upload)
    def _upload_folder(self: Any, working_dir: Any, repo_id: str, *args: Any, **more: Any) -> Any:
        if is_packed(getattr(self, "transformer", None)):
            complete(self, Path(working_dir), repo_id)
        return upload(self, working_dir, repo_id, *args, **more)

    return _upload_folder


_to = DiffusionPipeline.to
if not hasattr(_to, "__wrapped__"):
    DiffusionPipeline.to = _saying(_to)
    DiffusionPipeline.save_pretrained = _completing(DiffusionPipeline.save_pretrained)
    DiffusionPipeline._upload_folder = _completed(DiffusionPipeline._upload_folder)
