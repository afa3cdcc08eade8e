"""Teach diffusers and peft to read packed folders, without importing either ourselves.

diffusers finds quantizers in two module-level tables, to which dirotq/quantizer.py adds ours, and
has no place for what concerns whole pipelines or single files: those functions are wrapped
(dirotq/packed/pipelines.py, from_single_file.py). Our modules are imported at once where those of
diffusers are loaded, otherwise the moment that they are.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

OURS = {
    "diffusers.quantizers.auto": "dirotq.quantizer",
    "diffusers.loaders.single_file_utils": "dirotq.packed.from_single_file",
    "diffusers.pipelines.pipeline_utils": "dirotq.packed.pipelines",
    "diffusers.loaders.lora_pipeline": "dirotq.packed.lora_pipelines",
    "transformers.quantizers.auto": "dirotq.packed.text_quantizer",
    "peft": "dirotq.packed.peft_layers",
}
"""{module of diffusers: ours, whose import registers, once; Python's module cache sees to that}."""


def register_when_imported() -> None:
    """Register now or on diffusers' first import; calling it again changes nothing."""
    watched = {finder.host for finder in sys.meta_path if isinstance(finder, _Watch)}
    for host, ours in OURS.items():
        if host in sys.modules:
            importlib.import_module(ours)
        elif host not in watched:
            sys.meta_path.insert(0, _Watch(host))


class _Watch(importlib.abc.MetaPathFinder):
    """Steps aside for every module but ``host``, after which it registers, once.

    Whoever only asks whether ``host`` is there, as diffusers does of peft, changes nothing.
    """

    def __init__(self, host: str) -> None:
        self.host = host
        self.asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.host or self.asking:
            return None
        self.asking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            loader, execute = spec.loader, spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                importlib.import_module(OURS[self.host])

            loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
