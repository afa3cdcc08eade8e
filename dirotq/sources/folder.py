"""What a pipeline folder is made of: which of its files are read, which may be copied, and copies
that cost as little as their file system allows.

Reading follows links, as loaders do, and a fingerprint covers what is read. But a link inside a
component could lead to any file of this machine, and what we copy gets published. So a link leads

- anywhere within the model's folder, or within the folder of its component,
- from a snapshot of a Hugging Face cache to a blob of the same repository,
- or it is the whole folder of a component: then the files in there are the component's,

and any other one is refused. Hard links can't be told from files.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dirotq.errors import ConfigError
from dirotq.files.json_file import (
    CALL_FILE,
    INDEX,
    components,
    denoisers,
    read_json,
    weight_map,
)
from dirotq.files.walk import readable, walk
from dirotq.sources.hub import is_blob

IGNORED = ("README.md", "training.json", ".gitattributes")
STEMS = ("diffusion_pytorch_model", "model")
"""Standard names of weights. Others are variants (fp16, ema) or another program's files."""
SETTINGS = ("json", "txt", "model", "jinja", "tiktoken")
"""Suffixes of configurations, vocabularies and templates of chats."""
TEMPLATES = "additional_chat_templates"
FICLONE = 0x40049409
"""ioctl of Linux: let a file share another one's blocks until one of them is written to."""
_LICENCE = re.compile(r"(licen[sc]e|notice|copying|use[_-]policy)([._-].*)?", re.IGNORECASE)


def pipeline_files(root: Path, index: Mapping[str, Any], *, without: str = "") -> list[Path]:
    """Return every file below ``root`` that stands in a fingerprint.

    That is all but pictures, cards, weights of the component ``without``, and linked folders that
    are no component. Raises ConfigError for what can't be read, and for a link that leaves.
    """
    parts = components(index)

    def foreign(path: Path) -> bool:
        linked = path.parent == root and path.is_symlink() and path.is_dir()
        return linked and path.name not in parts

    return [
        path
        for path in walk(root, skip=foreign, check=lambda link: _refuse_leaving(link, root, parts))
        if path.name not in IGNORED
        and path.suffix not in (".png", ".jpg")
        and not (path.suffix == ".safetensors" and path.parent == root / without)
    ]


def carried_files(
    root: Path, index: Mapping[str, Any], *, without: Collection[str] = ()
) -> list[Path]:
    """Return what a copy of a pipeline needs: its components' files, index, call and licences.

    All but the components ``without``. Raises ConfigError for what can't be read.
    """
    top = [path for path in sorted(root.iterdir()) if _is_carried(path.name)]
    parts = [root / name for name in components(index) if name not in without]
    return [*map(readable, top), *(path for part in parts for path in component_files(part))]


def component_files(part: Path) -> list[Path]:
    """Return a component's settings, and weights under their standard names: what is loaded.

    Nothing hidden, no other formats, no code, no variants; ConfigError for what can't be read.
    """
    if not part.is_dir():
        return []
    weights = weight_names(part)
    inside = [p for p in sorted(part.iterdir()) if p.name in weights or _is_setting(p.name)]
    return [readable(p) for p in (*inside, *sorted((part / TEMPLATES).glob("[!.]*.jinja")))]


def weight_names(part: Path) -> set[str]:
    """Return the weights files that a component's index, or their standard name, asks for."""
    names = set()
    for stem in STEMS:
        if (index := part / f"{stem}.safetensors.index.json").is_file():
            names |= set(weight_map(index).values())
        if (part / f"{stem}.safetensors").exists():
            names.add(f"{stem}.safetensors")
    return names


def missing_weights(part: Path) -> list[str]:
    """Return weights files of a component that are not there, by their standard names."""
    names = weight_names(part)
    if not names:
        return [" or ".join(f"{stem}.safetensors" for stem in STEMS)]
    return sorted(name for name in names if not (part / name).is_file())


def place_rest(source: Path, target: Path, *, written: Collection[str] = ()) -> list[Path]:
    """Put all of a pipeline but its denoisers below ``target``; return the files there.

    written  components whose weights the caller writes: their settings alone are placed

    Links are resolved. No file is one that the source's owner may write to; all but weights are
    the caller's to change. Raises ConfigError for what can't be read, and OSError.
    """
    copies = []
    index = read_json(source / INDEX)
    for path in carried_files(source, index, without=denoisers(index)):
        if path.parent.name in written and path.parent.parent == source and _is_weights(path.name):
            continue
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            place(path, copy)
        else:
            shutil.copyfile(path, copy)
        copies.append(copy)
    return copies


def place(source: Path, target: Path) -> None:
    """Put the content of ``source``, through links, at ``target``, which does not exist yet.

    A blob of a Hugging Face cache, which nobody edits, may become a hard link. Any other file is
    its owner's to write to, through all its hard links: it is cloned (btrfs, XFS), or else copied.
    """
    real = source.resolve()
    if is_blob(real):
        with suppress(OSError):  # another file system, or one without links
            os.link(real, target)
            return
    with real.open("rb") as old, target.open("xb") as new:
        try:
            fcntl.ioctl(new, FICLONE, old.fileno())
        except OSError:  # two file systems, or one that can't
            shutil.copyfile(real, target)


def is_licence(name: str) -> bool:
    """Tell whether a file of this name holds terms: it goes wherever the model goes."""
    return bool(_LICENCE.fullmatch(name))


def stays(link: Path, *homes: Path) -> bool:
    """Tell whether a file or link leads into one of these folders, or to a blob of the same
    repository; ``homes`` are resolved."""
    real = link.resolve()
    repository = real.parents[1] if is_blob(real) else None
    if any(real.is_relative_to(home) for home in homes):
        return True
    return repository is not None and any(home.is_relative_to(repository) for home in homes)


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def _is_carried(name: str) -> bool:
    return name in (INDEX, CALL_FILE) or is_licence(name)


def _is_setting(name: str) -> bool:
    if ".index." in name:
        return name in [f"{stem}.safetensors.index.json" for stem in STEMS]
    return name[0] != "." and Path(name).suffix[1:] in SETTINGS and name not in IGNORED


def _refuse_leaving(link: Path, root: Path, parts: Collection[str]) -> None:
    """Refuse a link in a component, or to a file that is copied, as this module's head says."""
    top = root / link.relative_to(root).parts[0]
    if link == top and (top.name in parts or not _is_carried(top.name)):
        return
    if link != top and top.name not in parts:
        return  # nobody reads what lies there
    if stays(link, root.resolve(), *([top.resolve()] if link != top else [])):
        return
    raise ConfigError(
        f"{link} is a link out of the model's folder, to {link.resolve()}: that could be private, "
        "and would be copied into the packed model. Put a copy of the file in its place (`cp -L`), "
        "or let the whole folder of the component be a link"
    )
