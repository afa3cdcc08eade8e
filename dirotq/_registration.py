"""Teach diffusers to read packed folders, without importing diffusers ourselves.

diffusers finds quantizers in two module-level tables, to which dirotq/quantizer.py adds ours. That
module is imported here: at once if diffusers is loaded, otherwise the moment those tables exist.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

HOST = "diffusers.quantizers.auto"
REGISTRAR = "dirotq.quantizer"
"""Importing it registers (once; Python's import lock and module cache see to that)."""


def register_when_imported() -> None:
    """Register now or on diffusers' first import; calling it again changes nothing."""
    if HOST in sys.modules:
        importlib.import_module(REGISTRAR)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(importlib.abc.MetaPathFinder):
    """Steps aside for every module but HOST, after which it registers, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                importlib.import_module(REGISTRAR)

            loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
