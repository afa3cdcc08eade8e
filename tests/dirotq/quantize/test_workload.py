"""Shapes of published models on the meta device: no weights exist."""

import json

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import save_file

from dirotq.models.family import Site
from dirotq.pipeline.config import build, compose_config
from dirotq.pipeline.machine import gpu
from dirotq.quantize import workload
from dirotq.quantize.workload import Workload, calls_at_once

H200 = gpu("NVIDIA H200", 150_000_000_000, 128_000_000_000)


@pytest.fixture(autouse=True)
def only_shapes_count(monkeypatch):
    """The folders here hold the configurations of full-size models, and none of their weights."""
    monkeypatch.setattr("dirotq.sources.origin.refuse_incomplete", lambda *_, **__: None)


def of(folder, *overrides) -> Workload:
    cfg = compose_config([f"model={folder}", *overrides], "dirotq.conf")
    return instantiate(cfg.workload, _convert_="all")


def folder_of(tmp_path, transformer, vae):
    for name, config in (("transformer", transformer), ("vae", vae)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        # Whatever it holds: only its being there is looked at.
        save_file({"x": torch.zeros(1)}, tmp_path / name / "diffusion_pytorch_model.safetensors")
    (tmp_path / "model_index.json").write_text(
        json.dumps(
            {
                "_class_name": "FluxPipeline",
                "transformer": ["diffusers", transformer["_class_name"]],
                "vae": ["diffusers", "AutoencoderKL"],
            }
        )
    )
    return tmp_path


@pytest.fixture
def flux(tmp_path) -> Workload:
    """FLUX.1-dev."""
    transformer = {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": 19,
        "num_single_layers": 38,
        "guidance_embeds": True,
    }
    vae = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}
    return of(folder_of(tmp_path, transformer, vae))


def test_flux_is_as_large_as_published(flux):
    assert flux.image_tokens == 4096
    assert flux.guided == 1
    assert flux.parameters == pytest.approx(11.9e9, rel=0.01)
    assert flux.forward_flops == pytest.approx(74e12, rel=0.02)  # 174 ms on an H200
    assert flux.recorded == 512
    tokens = {flux.tokens(site) for site in flux.block_sites}
    assert tokens == {512, 4096, 4608}  # text, image, and both in the single-stream blocks
    assert flux.widest == 15360
    assert flux.channels == 3072


def test_flux_bytes(flux):
    one = next(site for site in flux.sites if site.dim == 15360)
    assert flux.moment_bytes(one) == 60 * 61 // 2 * 256 * 256 * 4  # its tiles in float32
    modulator = next(site for site in flux.sites if site.kind == "modulator")
    assert flux.moment_bytes(modulator) == 2 * 512 * 3072  # its rows in bfloat16
    assert 4 < 8 * sum(flux.packed.values()) / flux.parameters < 5  # bits, everything counted
    assert flux.state == pytest.approx(33e6, rel=0.1)


def test_tiny_flux_and_its_guidance():
    tiny = of("tiny_flux")
    assert (tiny.image_tokens, tiny.text_tokens, tiny.steps, tiny.guided) == (256, 48, 20, 1)
    guided = of("tiny_flux", "+model.call.guidance_scale=4.0", "capture.batch=3")
    assert guided.guided == 2  # its transformer embeds none
    assert guided.samples == 6
    assert guided.recorded == 1024


def test_text_of_models_without_a_table():
    def site(name):
        return Site(name, (name,), 64, (64,), "block", True)

    assert workload._reads_text(site("blocks.0.attn.add_q_proj"))
    assert workload._reads_text(site("blocks.0.ff_context.net.0.proj"))
    assert not workload._reads_text(site("blocks.0.attn.to_q"))


def test_calls_on_their_way():
    assert calls_at_once(10, 8, room=80, host=0) == (8, False)
    assert calls_at_once(10, 8, room=79, host=45) == (4, True)
    assert calls_at_once(10, 8, room=0, host=0) == (1, True)


def test_stages_estimate_what_was_measured(tmp_path):
    """One H200, FLUX.1-dev, 24 prompts of 28 steps, 512 calls (docs/compress.md)."""
    transformer = {
        "_class_name": "FluxTransformer2DModel",
        "num_layers": 19,
        "num_single_layers": 38,
        "guidance_embeds": True,
    }
    vae = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16}
    folder = folder_of(tmp_path, transformer, vae)
    overrides = (f"model={folder}", "prompts.calibration.count=24")
    cfg = compose_config(overrides, "dirotq.conf")
    work = of(folder, *overrides[1:])
    costs = {step.name: step.stage.cost(work, H200) for step in build(cfg).steps}
    measured = {"capture": 331, "basis": 30, "gptq": 58, "fuse": 36, "pack": 19}
    for stage, seconds in measured.items():
        assert costs[stage].seconds == pytest.approx(seconds, rel=0.25), stage
    for stage, vram in {"gptq": 10.3}.items():
        assert costs[stage].vram / 1e9 == pytest.approx(vram, rel=0.25), stage
    assert costs["capture"].ram / 1e9 == pytest.approx(4.4, rel=0.5)
    assert costs["capture"].disk / 1e9 == pytest.approx(33.9, rel=0.25)
