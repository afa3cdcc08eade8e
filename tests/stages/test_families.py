"""The seven stages on a tiny pipeline of every model family."""

import functools
import inspect
import json
import math

import pytest
import torch
import zarr
from family_line import family_line
from tiny_families import TINY
from tiny_line import run
from tiny_pipelines import PIPELINES, UNTABLED, family_folder

from dirotq.errors import UnsupportedError
from dirotq.models import families
from dirotq.models.denoisers import placed
from dirotq.models.discovery import discovered
from dirotq.models.family import Site
from dirotq.pipeline.artifact import Artifact
from dirotq.quantize.plan import read_plan
from dirotq.sources.opening import open_pipeline

STAGES = ["capture", "basis", "rank", "gptq", "fuse", "pack", "reference", "validate"]


@pytest.fixture(scope="module")
def line(tiny_root):
    """The line of a family: ``line("sana", "rank.r=8")``."""
    return functools.partial(family_line, tiny_root)


def planned(artifacts: dict[str, Artifact]) -> list[Site]:
    return [entry.site for entry in read_plan(artifacts["rank"].file("plan.json"))]


@pytest.mark.parametrize("name", [name for name in TINY if name in PIPELINES])
def test_every_family_runs_through(line, name):
    artifacts = run(line(name))
    assert list(artifacts) == STAGES
    for artifact in artifacts.values():
        assert all(math.isfinite(value) for value in artifact.metrics.values())
    assert planned(artifacts) == _sites(artifacts["pack"], name)
    assert artifacts["fuse"].metrics["network_error"] < 1e-5
    assert artifacts["validate"].metrics["sqnr_db"] > 10
    assert artifacts["validate"].metrics["psnr"] > 20
    sound = artifacts["validate"].metrics.get("sound_snr")
    assert (sound is None) == (name != "ltx2")
    assert sound is None or sound > 10
    report = json.loads(artifacts["validate"].file("report.json").read_text())
    assert len(report["timesteps"]) > 1  # of every pipeline, whatever it calls them
    assert all(None not in site["by_timestep"] for site in report["sites"])


def _sites(pack: Artifact, name: str) -> list[Site]:
    """The table's sites of the transformers whose configs the packed folder holds."""
    cls, found = type(TINY[name].build()), {}
    for file in sorted(pack.tree("model").glob("*transformer/config.json")):
        config = json.loads(file.read_text())
        skeleton = cls.from_config({k: v for k, v in config.items() if k != "quantization_config"})
        found[file.parent.name] = TINY[name].family.sites(skeleton)
    several = len(found) > 1
    return [s for part, sites in found.items() for s in placed(sites, part if several else "")]


@pytest.mark.parametrize(
    ("name", "image_tokens", "mask"), [("qwen_image", 16, 1), ("hunyuan_video", 2 * 16, 2)]
)
def test_masked_text_tokens_are_not_counted(tiny_root, line, name, image_tokens, mask):
    artifacts = run(line(name, "+model.call.negative_prompt=null", "until=capture"))
    moments = zarr.open_group(artifacts["capture"].tree("moments.zarr"), mode="r")
    image, text = (
        moments[f"transformer_blocks.0.attn.{site}"].attrs["tokens"] for site in ("qkv", "add_qkv")
    )
    calls = artifacts["capture"].metrics["calls"]
    assert image == calls * image_tokens
    pipe = open_pipeline(family_folder(tiny_root, name), torch.float32, torch.device("cpu"))
    known = inspect.signature(pipe.encode_prompt).parameters
    given = {k: v for k, v in PIPELINES[name].call.items() if k in known}
    texts = [json.loads(row)["prompt"] for row in (tiny_root / "families.jsonl").open()][:6]
    encoded = [pipe.encode_prompt(prompt, **given) for prompt in texts]
    # One prompt alone may need no padding, and no mask.
    lengths = [len(e[0][0]) if e[mask] is None else int(e[mask].sum()) for e in encoded]
    assert len(set(lengths)) > 1
    assert text == calls / len(texts) * sum(lengths)


# Lumina's forward asks how many tokens a mask leaves. The others are for docs/families.md.
@pytest.mark.parametrize(
    "name",
    [n if n == "lumina2" else pytest.param(n, marks=pytest.mark.families) for n in UNTABLED],
)
def test_a_transformer_without_a_table_is_discovered(line, name):
    artifacts = run(line(name))
    sites = planned(artifacts)
    if name == "lumina2":
        blocks = {"layers.0", "layers.1", "noise_refiner.0", "context_refiner.0"}
        assert {site.block for site in sites} == blocks
    assert len(sites) == artifacts["capture"].metrics["sites"] > 0
    assert artifacts["fuse"].metrics["network_error"] < 1e-5
    assert artifacts["validate"].metrics["sqnr_db"] > 10
    assert artifacts["validate"].metrics["psnr"] > 20


def test_what_cannot_be_traced_is_refused_with_the_reason(line, monkeypatch, tmp_path):
    def untraceable(*_, **__):
        raise RuntimeError("how many tokens? ask the data")

    monkeypatch.setattr(families, "FAMILIES", ())
    monkeypatch.setattr("diffusers.FluxTransformer2DModel.forward", untraceable)
    discovered.cache_clear()
    with pytest.raises(UnsupportedError, match=r"ask the data[\s\S]*CONTRIBUTING"):
        line("flux", f"store={tmp_path}")
