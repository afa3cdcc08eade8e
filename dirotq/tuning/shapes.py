"""Which linears are worth measuring: those of a packed model, or of the families we ship plans for.

Letters: M rows, K width, N outputs.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dirotq.files.json_file import read_json
from dirotq.models.denoiser_call import denoiser_call
from dirotq.models.family import Site
from dirotq.models.hollow import Cheaply, hollow
from dirotq.models.skeleton import empty_transformer
from dirotq.packed.config import Entry, read_packing
from dirotq.packed.folder import packed_folder
from dirotq.quiet import quiet

from .fastest import Shape
from .random_linear import spec_for

log = logging.getLogger(__name__)

ROWS = (1, 4, 16, 64, 256, 512, 1024, 1536, 2816, 4608, 18432)
"""1536, 2816, 4608 and 18432 are FLUX's at 512, 768 and 1024 pixels, and at batch 4."""
BLOCKS = (
    # FLUX: qkv, qkv + mlp, mlp up, mlp down, attention out, single block's out
    (3072, 9216), (3072, 21504), (3072, 12288), (12288, 3072), (3072, 3072), (15360, 3072),
    # PixArt: qkv, mlp up, mlp down, out; SANA: qkv, mlp up, mlp down
    (1152, 3456), (1152, 4608), (4608, 1152), (1152, 1152),
    (2240, 6720), (2240, 11200), (5600, 2240),
)  # fmt: skip
"""(K, N) of the sites in blocks."""
MODULATORS = ((3072, 18432), (3072, 9216), (1152, 6912), (2240, 13440))
W4A16_BLOCKS = ((3072, 9216), (12288, 3072), (1152, 4608))
FEW = 64
"""At W4A16, up to so many rows modulators are measured, and blocks above."""

SIDE = 1024
"""Pixels of a model's image, where its own defaults name none."""
PROMPT = "a photo of a small red house by the sea, " * 6
"""About as long as prompts are: text is rows too."""
BATCHES = (1, 2)
TOKENS, TEXT = 4096, 512
"""Rows of a model whose forward can't be followed: FLUX's, at 1024 x 1024."""


def grid(
    kinds: Iterable[str],
    m: Sequence[int] | None = None,
    k: Sequence[int] | None = None,
    n: Sequence[int] | None = None,
) -> Iterator[Shape]:
    """List shapes of the families with a table, most important first; m, k and n restrict them."""
    for kind in kinds:
        for rows in reversed(ROWS):
            if kind == "w4a16":
                pairs = (MODULATORS if rows <= FEW else ()) + (W4A16_BLOCKS if rows > FEW else ())
            else:
                pairs = BLOCKS
            for width, outputs in pairs:
                wanted = zip((m, k, n), (rows, width, outputs), strict=True)
                if all(only is None or value in only for only, value in wanted):
                    yield Shape(spec_for(kind, width, outputs), rows)


def shapes_of(folder: str | Path) -> list[Shape]:
    """List the shapes of a packed model at its usual size, batches of 1 and 2, largest first.

    Raises ArtifactError if the folder holds no packed model, UnsupportedError for a newer one.
    """
    root = packed_folder(folder, verify=False)
    config = read_json(root / "transformer" / "config.json")
    packing = config["quantization_config"]
    entries = read_packing(packing.get("sites"), packing.get("format"), packing.get("levels"))
    try:
        rows = rows_of(root, config, [site for site, _ in entries])
    except Exception as error:  # noqa: BLE001 - any line of a foreign pipeline
        log.warning(
            "how many rows the linears of %s read can't be seen (%s); they are measured at %d and "
            "%d", folder, str(error).strip()[:300], TOKENS, TEXT,
        )  # fmt: skip
        rows = {}
    found = {shape.key: shape for shape in reversed([*_shapes(entries, rows)])}
    return sorted(found.values(), key=_work, reverse=True)


def rows_of(root: Path, config: dict[str, Any], sites: Sequence[Site]) -> Mapping[str, set[int]]:
    """Return how many rows each site reads in one call of the model, by a forward without weights.

    Raises what a foreign pipeline or forward raises.
    """
    import diffusers

    defaults = root / "generation.json"
    call = {"height": SIDE, "width": SIDE, "prompt": PROMPT}
    call |= read_json(defaults) if defaults.is_file() else {}
    args, kwargs = denoiser_call(root, load_encoders=False, **call)
    with quiet():
        cls = getattr(diffusers, config["_class_name"])
        transformer = hollow(empty_transformer(config, cls))
    return _watched(transformer, args, kwargs, sites)


def _watched(
    transformer: nn.Module, args: Any, kwargs: Any, sites: Sequence[Site]
) -> Mapping[str, set[int]]:
    """Run one forward of a hollow network, and note how long the inputs of the sites are."""
    seen: dict[str, set[int]] = {site.name: set() for site in sites}

    def note(site: Site, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[site.name].add(len(site.tokens_of(inputs[0])))

    for site in sites:
        for linear in site.linears:
            transformer.get_submodule(linear).register_forward_pre_hook(partial(note, site))
    with torch.no_grad(), Cheaply():
        transformer(*args, **kwargs)
    return seen


def _shapes(entries: Iterable[Entry], rows: Mapping[str, set[int]]) -> Iterator[Shape]:
    for site, spec in entries:
        unknown = {TEXT} if site.text else {1} if site.kind == "modulator" else {TOKENS, TEXT}
        for m in rows.get(site.name) or unknown:
            for batch in BATCHES:
                yield Shape.of(spec, m * batch)


def _work(shape: Shape) -> int:
    return shape.m * shape.spec.outputs * shape.spec.width
