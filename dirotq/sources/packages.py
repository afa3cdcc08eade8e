"""Packages that a pipeline's folder calls for and that are not here, told before anything runs.

diffusers and transformers import many packages only where they are used: after the weights are
read, or in the first call.
"""

import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dirotq.errors import UnsupportedError
from dirotq.files.json_file import INDEX, components, read_json
from dirotq.quiet import quiet
from dirotq.sources.components import class_named

log = logging.getLogger(__name__)

MODULES = {"protobuf": "google.protobuf"}
"""What is imported of a package, where that is not its name."""
PACKAGES = {"vision": "pillow", "bs4": "beautifulsoup4", "opencv": "opencv-python"}
"""Packages by what diffusers and transformers call them, where that is not their name."""
TIKTOKEN = ("tiktoken.model", "*.tiktoken")
SENTENCEPIECE = "*.model"
OPTIONAL = {
    "ftfy": "texts of Wan's image-to-video and of SkyReels' pipelines",
    "tiktoken": "vocabularies of tiktoken",
    "torchvision": "processors with a part for videos (Qwen-Image-Edit)",
}
"""What pipelines of folders often call for, and which."""
CLEANERS = ("basic_clean", "_basic_clean")
"""What diffusers calls functions that clean texts, by ftfy."""


def installed(package: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(MODULES.get(package, package)) is not None
    except (ImportError, ValueError):  # no such parent; a stand-in without a spec
        return MODULES.get(package, package) in sys.modules


def refuse_missing_packages(folder: Path, source: str, *, prompts: bool = True) -> None:
    """Raise UnsupportedError naming the packages that a pipeline lacks here, and what wants them.

    source   its name in the error
    prompts  texts will be encoded; otherwise what encoding them lacks is logged
    """
    import diffusers

    index = read_json(folder / INDEX)
    name = str(index.get("_class_name"))
    pipeline: Any = getattr(diffusers, name, None)
    found: dict[str, list[str]] = {}
    with quiet():
        for package, what in _wanted(folder, index, pipeline):
            found.setdefault(what, []).append(package)
        called = [package for package in _called(pipeline) if not installed(package)]
    if called and prompts:
        found.setdefault(f"the {name}", []).extend(called)
    elif called:
        log.warning(
            "a %s needs %s to encode texts, which is not installed here: pip install %s",
            name, " and ".join(called), " ".join(called),
        )  # fmt: skip
    if not found:
        return
    names = sorted({package for packages in found.values() for package in packages})
    build = ", torchvision of the build of your torch" if "torchvision" in names else ""
    said = "; ".join(f"{what} needs {' and '.join(names)}" for what, names in found.items())
    raise UnsupportedError(
        f"{source} needs packages that are not installed here: {said}. Install them: pip install "
        f"{' '.join(names)}{build}"
    )


def _wanted(folder: Path, index: Mapping[str, Any], pipeline: Any) -> Iterator[tuple[str, str]]:
    """Yield (package that is not here, what can't be opened without it)."""
    yield from ((package, f"the {index.get('_class_name')}") for package in _of_class(pipeline))
    for part, (library, cls) in components(index).items():
        wanted = (*_of_class(class_named(library, cls)), *_of_vocabulary(folder / part))
        yield from ((package, f"the {part} ({cls})") for package in dict.fromkeys(wanted))


def _of_class(cls: Any) -> Iterator[str]:
    """Name what a class lacks: libraries put a placeholder in its place, which says so; processors
    make their part for videos by torchvision."""
    if not isinstance(cls, type):
        return
    if stands_in := cls.__dict__.get("_backends"):
        from diffusers.utils.import_utils import BACKENDS_MAPPING as OF_DIFFUSERS
        from transformers.utils.import_utils import BACKENDS_MAPPING as OF_TRANSFORMERS

        here = {**OF_DIFFUSERS, **OF_TRANSFORMERS}
        for each in stands_in:
            package = str(getattr(each, "package_name", each))
            if not (here[package][0]() if package in here else installed(package)):
                yield PACKAGES.get(package, package)
    elif "video_processor" in getattr(cls, "get_attributes", tuple)():
        from transformers import utils

        if not utils.is_torchvision_available():
            yield "torchvision"


def _of_vocabulary(part: Path) -> Iterator[str]:
    """Name what reads a tokenizer's vocabulary, where it has no tokenizer.json."""
    if (part / "tokenizer.json").is_file() or not part.is_dir():
        return
    wanted: tuple[str, ...] = ()
    if any(file for pattern in TIKTOKEN for file in part.glob(pattern)):
        wanted = ("tiktoken",)
    elif any(part.glob(SENTENCEPIECE)):
        wanted = ("sentencepiece", "protobuf")
    yield from (package for package in wanted if not installed(package))


def _called(pipeline: Any) -> list[str]:
    """Name what the function beside a pipeline that cleans its texts uses without asking for it."""
    module = sys.modules.get(getattr(pipeline, "__module__", ""))
    for name in CLEANERS:
        try:
            getattr(module, name, str)("")
        except NameError as error:  # imported only where it is installed
            return [str(error.name)]
    return []
