"""diffusers' ``from_single_file``, given a packed transformer's file: it says what to call instead.

The file holds codes under the names of sites; which linears they are is said by the config.json in
its folder. Imported once diffusers' reader of single files is (dirotq/_registration.py).
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from diffusers.loaders import single_file_utils

from dirotq.errors import UnsupportedError

READER = "load_single_file_checkpoint"
READERS = ("single_file_utils", "single_file", "single_file_model")
"""Modules of diffusers.loaders that know it by name, the last two if they came before us."""


def _refusing(read: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(read)
    def load_single_file_checkpoint(file: Any, *args: Any, **kwargs: Any) -> Any:
        found = read(file, *args, **kwargs)
        packed = next((name for name in found if name.endswith(".qweight")), None)
        if packed and f"{packed.removesuffix('qweight')}wscale" in found:
            raise UnsupportedError(
                f"{file} is packed by DiRotQ: it holds codes ({packed}), and the config.json "
                "beside it says what they are. Use from_pretrained with its folder "
                '("FOLDER/transformer"), or DiffusionPipeline.from_pretrained with the whole one'
            )
        return found

    return load_single_file_checkpoint


_reader = _refusing(getattr(single_file_utils, READER))
for _name in READERS:
    if (_module := sys.modules.get(f"diffusers.loaders.{_name}")) is not None:
        setattr(_module, READER, _reader)
