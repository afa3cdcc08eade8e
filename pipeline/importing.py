"""Python looks for garbage among all that torch, diffusers and transformers import, in vain.

Millions of objects stay. Python looked through them again and again while their number grew: a
fifth of the seconds until the first stage begins.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collecting() -> Iterator[None]:
    """Look for no garbage in this block; also a decorator, of a function that imports much."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def imported() -> None:
    """Never look through what is there now: imports, and little else. For processes of our own.

    Only the first time: what a run left may be garbage, with memory of a GPU. In a block without
    collecting, at whose end Python would look through it once more.
    """
    if not gc.get_freeze_count():
        gc.freeze()
