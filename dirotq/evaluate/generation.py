"""Images of all prompts, batch by batch, on disk as they are made."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from dirotq.progress import track
from dirotq.sources.generation import generate
from dirotq.sources.prompts import Prompt

from .images import ImageWriter


def generate_all(
    writer: ImageWriter,
    pipe: Any,
    prompts: Sequence[Prompt],
    call: Mapping[str, float | int],
    batch: int,
    what: str,
) -> None:
    """:func:`generate` whatever ``writer`` lacks, ``batch`` prompts at a time, each batch written
    before the next one starts. ``what`` names the images in the progress line.
    """
    for span in track(writer.missing(batch), what):
        began = time.perf_counter()
        images = generate(pipe, prompts[span.start : span.stop], call)
        writer.write(span.start, images, (time.perf_counter() - began) / len(span))
