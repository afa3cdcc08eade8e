"""Files and packages that a learned metric stands on: there, or a ConfigError that says what to do.

Nothing is downloaded. Weights come as safetensors or TorchScript: nothing is unpickled.
"""

import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from dirotq.errors import ConfigError
from dirotq.files.digest import input_digests


def local_file(metric: str, path: str, what: str) -> Path:
    """Return the file ``path``. Raises ConfigError with ``what`` it should be if there is none."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{metric}: {path} does not exist. It should be {what} (docs/metrics.md)")
    return file


def local_folder(metric: str, path: str, what: str) -> Path:
    """Return the folder ``path``. Raises ConfigError if there is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{metric}: {path} is no folder. It should be {what} (docs/metrics.md)")
    return folder


def digests(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return {path below ``root``: SHA-256}, in order."""
    return {
        file.relative_to(root).as_posix(): digest
        for file, digest in sorted(input_digests(files).items())
    }


def refuse_missing(metric: str, package: str, install: str) -> None:
    """Raise ConfigError unless ``package`` is installed; ``install`` is pip's name for it."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{metric} needs the package {package}, which is not installed: pip install {install} "
            "(of the torch build you have), or leave the metric out of `metrics`"
        )


def imported(metric: str, package: str, install: str) -> ModuleType:
    """Import the package only now: it takes seconds, and brings what nobody else needs.

    Raises ConfigError if it is missing or can't be imported beside what is installed.
    """
    refuse_missing(metric, package, install)
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"{metric}: the package {package} can't be imported here ({error}); it often needs "
            f"another version of torchvision or transformers. Reinstall it: pip install {install}"
        ) from error
