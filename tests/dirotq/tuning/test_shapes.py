"""Which linears are measured: of a packed model, by a forward without weights, or of a grid."""

import json
import logging

import diffusers
import pytest
from tiny_pipelines import PIPELINES, family_folder

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.models.families import family_of
from dirotq.models.skeleton import empty_transformer
from dirotq.packed.config import read_packing
from dirotq.tuning import shapes
from dirotq.tuning.fastest import Shape
from dirotq.tuning.random_linear import FORMATS, spec_for
from dirotq.tuning.shapes import TEXT, TOKENS, grid, rows_of, shapes_of

SHAPE = Shape(spec_for("w4a4", 3072, 9216), 4608)
TOKEN = 8
"""Pixels along a token of tiny FLUX: 4 in the VAE, 2 in the patch."""


def test_the_grid_holds_every_model_and_can_be_restricted():
    found = list(grid(FORMATS))
    assert len({shape.key for shape in found}) == len(found)
    assert {shape.key[0] for shape in found} == set(FORMATS)
    assert {3072, 12288, 15360, 1152, 4608, 2240, 5600} <= {s.spec.width for s in found}
    assert list(grid(["w4a4"], [4608], [3072], [9216])) == [SHAPE]
    assert [s.key for s in grid(["w4a16"], [1], [3072])] == [
        ("w4a16", 1, n, 3072) for n in (18432, 9216)
    ]


def entries_of(folder):
    config = json.loads((folder / "transformer" / "config.json").read_text())
    packing = config["quantization_config"]
    return read_packing(packing["sites"], packing["format"], packing.get("levels"))


def test_a_models_linears_at_its_size_in_two_batches(packed_folder):
    found = shapes_of(packed_folder)
    assert len({shape.key for shape in found}) == len(found)
    work = [s.m * s.spec.outputs * s.spec.width for s in found]
    assert work == sorted(work, reverse=True)
    entries = entries_of(packed_folder)
    assert {s.spec.outputs for s in found} == {spec.outputs for _, spec in entries}
    side = json.loads((packed_folder / "generation.json").read_text())["height"]
    image, text = (side // TOKEN) ** 2, 8
    assert {s.m for s in found if s.spec.activations.bits == 16} == {1, 2}
    assert {s.m for s in found if s.spec.activations.bits == 4} == {
        batch * rows for batch in (1, 2) for rows in (image, text, image + text)
    }


def test_without_a_size_of_its_own_a_model_is_measured_at_1024(packed_folder):
    (packed_folder / "generation.json").unlink()
    image = (1024 // TOKEN) ** 2
    assert {image, 2 * image} <= {shape.m for shape in shapes_of(packed_folder)}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_family_can_be_followed(name, tiny_root):
    folder = family_folder(tiny_root, name)
    config = json.loads((folder / "transformer" / "config.json").read_text())
    skeleton = empty_transformer(config, getattr(diffusers, config["_class_name"]))
    sites = family_of(config["_class_name"]).sites(skeleton)
    rows = rows_of(folder, config, sites)
    assert rows.keys() == {site.name for site in sites}
    for site in sites:
        assert rows[site.name], site.name
        one_row = site.kind == "modulator" and not site.text
        assert (max(rows[site.name]) <= 2) == one_row, site.name


def test_a_forward_that_cannot_be_followed_is_said_and_guessed(packed_folder, monkeypatch, caplog):
    def refused(*_, **__):
        raise UnsupportedError("how many tokens? ask the data")

    monkeypatch.setattr(shapes, "denoiser_call", refused)
    with caplog.at_level(logging.WARNING):
        found = shapes_of(packed_folder)
    assert "ask the data" in caplog.text
    assert {s.m for s in found} == {1, 2, TEXT, 2 * TEXT, TOKENS, 2 * TOKENS}
    text = {spec.outputs for site, spec in entries_of(packed_folder) if site.text}
    image = {spec.outputs for site, spec in entries_of(packed_folder) if not site.text}
    assert {s.m for s in found if s.spec.outputs in text - image} <= {TEXT, 2 * TEXT}


def test_a_folder_that_is_not_packed_is_refused(folder, tmp_path):
    with pytest.raises(ArtifactError, match="not packed by DiRotQ"):
        shapes_of(folder)
    with pytest.raises(ArtifactError, match="holds no packed pipeline"):
        shapes_of(tmp_path)
