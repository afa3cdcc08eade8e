"""What the core reads back: manifests, records, digests, recipes, and the command line itself."""

import atexit
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fuzz_cli import check_command_line
from fuzz_packed import Odd, load_odd, odd_settings
from hypothesis import strategies as st
from tiny_line import build_transformer, configured, run
from tiny_spec import tiny_spec

from dirotq.cli import main
from dirotq.files.digest import file_digest, input_digests
from dirotq.models.flux import FLUX
from dirotq.models.skeleton import empty_transformer
from dirotq.packed.config import check_places
from dirotq.packed.swap import put_packed
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.stage import fingerprint, recipe
from dirotq.quantizer import DirotqConfig

from .values import SCALARS, VALUES, as_json, damaged, edited

DATA = {"a.json": b"1", "tree/x/0": b"chunk"}


def _write(file: Path, text: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))


def _texts(original: Any) -> st.SearchStrategy[bytes]:
    """``original`` as JSON: edited, and damaged as bytes."""
    made = edited(original).map(as_json).map(str.encode)
    return made | made.flatmap(damaged)


@functools.cache
def _digests() -> dict[str, dict[str, Any]]:
    return {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in DATA.items()
    }


MANIFEST = {
    "schema": 1, "stage": "gptq", "fingerprint": "0" * 16, "recipe": {"stage": {"r": 4}},
    "files": _digests(), "metrics": {"loss": 0.5, "psnr": "inf"},
}  # fmt: skip
PROVENANCE = {"started": "2026-01-01T00:00:00+0000", "seconds": 1.5, "argv": ["x"], "gpu": [],
              "overrides": ["a=1"], "libraries": {"torch": "2"}, "peak": {"host": 5}}  # fmt: skip


def read_manifest(folder: Path, example: tuple[bytes, bytes]) -> None:
    root = folder / "gptq" / ("0" * 16)
    _write(root / "manifest.json", example[0])
    _write(root / "provenance.json", example[1])
    for name, content in DATA.items():
        _write(root / "data" / name, content)
    refused = []
    for use in (
        lambda a: a.metrics, lambda a: a.bytes, lambda a: a.provenance, lambda a: a.file("a.json"),
        lambda a: a.tree("tree"), lambda a: a.check(),
    ):  # fmt: skip
        try:
            use(Artifact("gptq", "0" * 16, root))
        except Exception as error:  # noqa: BLE001 - the first one that is not ours counts
            refused.append(error)
    for error in sorted(refused, key=lambda error: type(error).__module__ == "dirotq.errors"):
        raise error


def read_digests(folder: Path, content: bytes) -> None:
    """digests.json: whatever it says, a digest is that of the file."""
    file = folder / "weights"
    file.write_bytes(b"x" * 100)
    with (
        mock.patch("dirotq.files.digest.LARGE", 10),
        mock.patch.dict("os.environ", {"DIROTQ_CACHE": str(folder)}),
    ):
        _write(folder / "digests.json", content.replace(b"FILE", str(file).encode()))
        assert input_digests([file]) == {file: file_digest(file)}


@functools.cache
def _packed() -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of a packed transformer, and of the transformer."""
    network = build_transformer()
    entries = [
        (s, tiny_spec(dim=s.in_features, rows=s.out_features, rank=16)) for s in FLUX.sites(network)
    ]
    return json.loads(json.dumps(DirotqConfig.of(entries).to_dict())), dict(network.config)


def read_packed(folder: Path, content: bytes) -> None:
    from diffusers import FluxTransformer2DModel

    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return  # diffusers reads the file
    if isinstance(values, dict):
        config = DirotqConfig.from_dict({k: v for k, v in values.items() if k != "quant_method"})
        transformer = empty_transformer(_packed()[1], FluxTransformer2DModel)
        check_places(transformer, config.entries())  # as the quantizer does, in this order
        put_packed(transformer, config.entries())


def read_recipe(folder: Path, value: Any) -> None:
    assert fingerprint(recipe(value)) == fingerprint(recipe(value))


def _left(argv: list[str]) -> None:
    """One command on the toy line, in this process; it ends with status 0 or 2."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    try:
        main(argv, config="toyline.conf")
    except SystemExit as left:
        assert left.code in (0, 2, None), f"status {left.code}"


def read_arguments(folder: Path, words: list[str]) -> None:
    with mock.patch("tempfile.tempdir", str(folder)):
        check_command_line(words)


def read_packed_folder(folder: Path, odd: Odd) -> None:
    with mock.patch("tempfile.tempdir", str(folder)):
        load_odd(packed_model(), odd)


@functools.cache
def packed_model() -> Path:
    """A packed tiny model, made once and removed with the process."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-packed-", dir="/tmp"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return run(configured(root, root / "store", "until=pack"))["pack"].data / "model"


STORED = ("numbers/*/manifest.json", "numbers/*/provenance.json", "runs/*/artifacts.json",
          "store.json", "total/*/manifest.json", "squares/*/provenance.json")  # fmt: skip
DAMAGE = st.tuples(
    st.sampled_from(STORED),
    st.sampled_from(("bytes", "json", "empty", "gone", "folder", "link")),
    VALUES,
    st.integers(0, 200),
    st.sampled_from(
        (["plan"], ["verify"], ["gc"], ["gc", "--yes"], ["compress"], ["explain"],
         ["verify", "--remove"], ["gc", "--keep", "0", "--yes"])
    ),
)  # fmt: skip


def read_store(folder: Path, example: tuple[str, str, Any, int, list[str]]) -> None:
    """One file of a finished store is damaged; then one command."""
    where, how, value, at, argv = example
    with _inside(folder):
        if not (template := folder.parent / "template").is_dir():
            _left(["compress"])
            shutil.copytree(folder / "store", template)
        shutil.copytree(template, folder / "store", dirs_exist_ok=True)
        for file in sorted((folder / "store").glob(where))[:1]:
            content = file.read_bytes()
            file.unlink()
            match how:
                case "bytes":
                    file.write_bytes(content[: at % (len(content) + 1)])
                case "json":
                    file.write_text(as_json(_put(json.loads(content), at, value)))
                case "empty":
                    file.touch()
                case "folder":
                    file.mkdir()
                case "link":
                    file.symlink_to("nowhere")
        _left(argv)


def _put(content: Any, at: int, value: Any) -> Any:
    """``value`` for the node number ``at``, or for everything."""
    if isinstance(content, Mapping) and content and at % 3:
        key = sorted(content)[at % len(content)]
        return {**content, key: _put(content[key], at // 3, value)}
    return value


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """The store, and whatever is written relative to the working directory, in ``folder``."""
    with mock.patch.dict("os.environ", {"DIROTQ_STORE": str(folder / "store")}), chdir(folder):
        yield


RECIPES = st.recursive(
    SCALARS | st.binary(max_size=2) | st.just(Path("x")) | st.just(torch.float32) | st.just(dict),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3),
    max_leaves=6,
)
MANIFESTS = st.tuples(_texts(MANIFEST), _texts(PROVENANCE))
DIGESTS = _texts({"FILE": [100, 1, "0" * 64], "other": [1, 2, "x"]})
PACKED = st.deferred(lambda: _texts(_packed()[0]))
FOLDERS = st.deferred(lambda: odd_settings(packed_model()))
