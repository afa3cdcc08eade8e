"""Pictures inside of a page: data URLs of as good a quality as a budget of bytes allows."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

QUALITIES = range(95, 5, -5)
"""Of lossy WebP, the best first."""
LOSSLESS_GAIN = 4
"""PNG is not tried where it had to make a picture smaller by more than this."""


@dataclass(frozen=True, slots=True)
class Embedded:
    """``urls`` of pictures that belong together, and how they were stored: ``"PNG"``, ``"WebP, \
quality 80"``, with ``", half size"`` where even the lowest quality was too large."""

    urls: tuple[str, ...]
    stored: str


def embed(pictures: Sequence[Image.Image], budget: int) -> Embedded:
    """Store ``pictures`` in at most ``budget`` characters of data URLs, all in one quality.

    Without loss if they fit so; else as WebP, and smaller by halves only if no quality fits. Below
    16 pixels they stay as they are, whatever they take.
    """
    raw = sum(3 * p.width * p.height for p in pictures)
    if raw <= LOSSLESS_GAIN * budget:
        urls = [_url(p, "PNG") for p in pictures]
        if sum(map(len, urls)) <= budget:
            return Embedded(tuple(urls), "PNG, lossless")
    halves = 0
    while True:
        if (found := _best(pictures, budget)) or min(min(p.size) for p in pictures) < 16:
            quality, urls = found or (QUALITIES[-1], _webp(pictures, QUALITIES[-1]))
            size = f", 1/{2**halves} of the size" if halves else ""
            return Embedded(tuple(urls), f"WebP, quality {quality}{size}")
        pictures = [p.reduce(2) for p in pictures]
        halves += 1


def _best(pictures: Sequence[Image.Image], budget: int) -> tuple[int, list[str]] | None:
    """Find the best quality that fits, by bisection: (quality, urls)."""
    found, low, high = None, 0, len(QUALITIES)
    while low < high:
        middle = (low + high) // 2
        urls = _webp(pictures, QUALITIES[middle])
        if sum(map(len, urls)) <= budget:
            found, high = (QUALITIES[middle], urls), middle
        else:
            low = middle + 1
    return found


def _webp(pictures: Sequence[Image.Image], quality: int) -> list[str]:
    # Slower methods make files that are hardly smaller.
    return [_url(p, "WEBP", quality=quality, method=0) for p in pictures]


def _url(picture: Image.Image, form: str, **options: int) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
