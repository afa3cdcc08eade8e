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
    """Steps aside for every module but HOST, whose loader it wraps once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != HOST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


class _RegisterAfter(importlib.abc.Loader):
    """Executes the module as its own loader would, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module(REGISTRAR)
