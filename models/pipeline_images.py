"""The pictures that a pipeline starts from, as the signature and the name of its class tell."""

import inspect
import re
from typing import Any

PICTURES = ("image", "mask_image")
"""Arguments of a pipeline's call, and columns of prompt files."""
EDITS = re.compile("Edit|Kontext|Img2Img|I2I|Inpaint|Fill|ImageToVideo|Image2Video|I2V")
"""In the names of classes that change a picture, or begin with one, though it may be optional."""
LISTED = re.compile("^(?!Flux2).*(Kontext|Img2Img|Inpaint|Fill)")
"""Of classes to which a list of pictures is a batch. To others it is one prompt's references."""

SEVERAL = re.compile("^Flux2(?!.*Inpaint)|^QwenImage21|EditPlus")
"""Of classes that take several ``image``s as the references of one prompt."""
ITERATED = re.compile("^QwenImage21")
"""Of classes that go through the pictures of a prompt, be it one alone."""


def pictures_taken(pipeline: Any) -> tuple[str, ...]:
    """Return those of :data:`PICTURES` that the call of a pipeline's class takes."""
    known = inspect.signature(pipeline.__call__).parameters
    return tuple(name for name in PICTURES if name in known)


def pictures_needed(pipeline: Any) -> tuple[str, ...]:
    """Return those that it can't do its work without; of a painter, the picture and its mask."""
    taken = pictures_taken(pipeline)
    if "mask_image" in taken or EDITS.search(pipeline.__name__):
        return taken
    known = inspect.signature(pipeline.__call__).parameters
    return tuple(name for name in taken if known[name].default is inspect.Parameter.empty)


def takes_batches(pipeline: Any) -> bool:
    """Tell whether several prompts, each with its own picture, make one call."""
    return LISTED.search(pipeline.__name__) is not None


def takes_several(pipeline: Any) -> bool:
    """Tell whether one prompt may have several pictures as its references."""
    return SEVERAL.search(pipeline.__name__) is not None


def as_taken(pipeline: Any, picture: Any) -> Any:
    """Return a prompt's picture, or list of them, as the call of a pipeline's class takes it."""
    alone = not isinstance(picture, list)
    return [picture] if alone and ITERATED.search(pipeline.__name__) else picture
