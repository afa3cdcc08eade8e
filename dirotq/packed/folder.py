"""What a packed folder has to be like before diffusers and transformers open anything in it."""

import logging
import re
import shlex
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from dirotq.errors import ArtifactError, ConfigError
from dirotq.files.json_file import INDEX, read_json
from dirotq.files.sums import SUMS, check_sums, renewing
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.manifest import MANIFEST
from dirotq.pipeline.place import MARKER

log = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model"


def packed_folder(folder: str | Path, *, verify: bool = True) -> Path:
    """Return the diffusers folder itself, checked to hold a transformer packed by DiRotQ.

    folder  it, or the artifact of ``pack`` around it
    verify  hold every file against the digests in it (SHA256SUMS) and in its artifact's manifest

    Raises ArtifactError if the folder holds no packed pipeline, or a file differs.
    """
    root = _place(folder)
    artifact = artifact_around(root)
    if verify and artifact is not None:
        artifact.tree("model")
    config = root / "transformer" / "config.json"
    if not config.is_file() or not (root / INDEX).is_file():
        if not Path(folder).expanduser().is_dir():
            found = "is a file" if root.exists() else "does not exist"
            raise ArtifactError(
                f"{folder!s:.300} {found}; give the folder that `dirotq compress` printed (one on "
                "the hub is downloaded first: hf download ORG/NAME --local-dir FOLDER)"
            )
        raise ArtifactError(
            f"{folder} holds no packed pipeline (no {INDEX} with a transformer/config.json below "
            "it); give the folder that `dirotq compress` printed (`dirotq list` knows those of a "
            "store)"
        )
    listed = verify and check_sums(root)
    _refuse_others(read_json(config).get("quantization_config"), folder)
    if verify and not listed and artifact is None:
        log.warning(
            "%s has no %s, so its bytes can't be checked: an older DiRotQ wrote it (%s makes one)",
            root, SUMS, renewing(root),
        )  # fmt: skip
    return root


def _refuse_others(packing: Any, folder: str | Path) -> None:
    """Raise ArtifactError unless a transformer's ``quantization_config`` is DiRotQ's."""
    method = packing.get("quant_method") if isinstance(packing, dict) else None
    if method == "dirotq":
        return
    what_to_do = (
        f"pack it with `dirotq compress {shlex.quote(f'model={folder}')}`"
        if packing is None
        else "pack the 16-bit model that it was made from, with `dirotq compress`"
    )
    raise ArtifactError(
        f"{folder} is a diffusers pipeline, but its transformer is not packed by DiRotQ "
        f"(quant_method {method!r:.60}); {what_to_do}"
    )


def held(folder: str | Path) -> AbstractContextManager[Any]:
    """Keep a folder of a store from being replaced or removed while it is read."""
    artifact = artifact_around(_place(folder))
    in_store = artifact is not None and (artifact.path.parent.parent / MARKER).is_file()
    return artifact.held() if artifact is not None and in_store else nullcontext()


def variant_of(root: Path, wanted: str | None) -> str | None:
    """Choose the transformer's files: None for the plain names, else a variant such as ``fp16``.

    wanted  the variant asked for, or ArtifactError; None takes the only one there is
    """
    names = [file.name for file in (root / "transformer").glob(f"{WEIGHTS}*")]
    whole = re.compile(rf"{WEIGHTS}(?:\.([\w-]+?))?(?:-\d{{5}}-of-\d{{5}})?\.safetensors")
    found = sorted({match[1] or "" for name in names if (match := whole.fullmatch(name))})
    if wanted is None and (not found or found[0] == ""):
        return None
    if wanted in found:
        return wanted
    if wanted is None and len(found) == 1:
        return found[0]
    raise ArtifactError(
        f"{root / 'transformer'} holds the weights of "
        f"{', '.join(f'variant={name!r}' if name else 'no variant' for name in found) or 'none'}, "
        f"not of variant={wanted!r:.60}; name one that is there, dirotq.load(folder, variant=...)"
    )


def _place(folder: str | Path) -> Path:
    """Return the diffusers folder that is meant: this one, or the one in an artifact."""
    try:
        root = Path(folder).expanduser()
        inside = (root / MANIFEST).is_file() and not (root / INDEX).is_file()
    except (TypeError, RuntimeError) as error:  # ~nobody
        raise ConfigError(f"{folder!r:.200} is no path of a folder: {error}") from error
    return root / "data" / "model" if inside else root


def artifact_around(root: Path) -> Artifact | None:
    """Return the artifact of ``pack`` whose data/model this is, also through a link."""
    place = root.resolve()
    around = place.parent.parent
    if place.parts[-2:] != ("data", "model") or not (around / MANIFEST).is_file():
        return None
    artifact = Artifact(around.parent.name, around.name, around)
    try:
        manifest = read_json(around / MANIFEST)
    except ConfigError:
        manifest = {}
    # Other people's files have this name too; a damaged one of ours is told by its place.
    return artifact if manifest.get("stage", around.parent.name) == "pack" else None
