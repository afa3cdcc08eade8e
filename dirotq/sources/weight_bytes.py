"""Bytes of a model's weights, told from its files or from what their index says."""

from pathlib import Path

from dirotq.files.json_file import read_json
from dirotq.files.names import components
from dirotq.sources.folder import INDEX, missing_weights, weight_names
from dirotq.sources.model import DiffusersModel


def component_bytes(model: DiffusersModel) -> dict[str, int]:
    """{component: bytes of its weights}, as far as they are known."""
    root = model.folder(weights=False)
    folders = (root / name for name in sorted(components(read_json(root / INDEX))))
    return {folder.name: _bytes(folder) for folder in folders if folder.is_dir()}


def cache_bytes(model: DiffusersModel) -> int:
    """What a model of a single file, or with LoRAs, is going to take in DiRotQ's cache.

    Components of a Hugging Face cache, which are links, become links to the same files.
    """
    place = model.assembled()
    if place is None or place.is_dir():
        return 0
    root = model.folder(weights=False)
    beside = [f for f in root.glob("*/*.safetensors") if f.parent.name != "transformer"]
    file = Path(model.path).expanduser()
    whole = file.stat().st_size if file.is_file() else _bytes(root / "transformer")
    return whole + sum(f.stat().st_size for f in beside if not f.is_symlink())


def _bytes(folder: Path) -> int:
    files = [folder / name for name in weight_names(folder)]
    found = sum(file.stat().st_size for file in files if file.is_file())
    if not missing_weights(folder):
        return found
    indexes = [read_json(i).get("metadata") for i in folder.glob("*.safetensors.index.json")]
    sizes = [m.get("total_size") for m in indexes if isinstance(m, dict)]
    return max([found, *(size for size in sizes if isinstance(size, int))])
