"""Pipelines of full size, made narrow: they draw, and every transformer has weights of its own."""

import diffusers
import pytest
import torch
from narrow_models import NARROW

from dirotq.benchmarks import full_size

FLUX2 = NARROW["flux2_klein"] | {"joint_attention_dim": 96}
CHANGES = {
    "flux2_dev": FLUX2,
    "qwen_image": NARROW["qwen_image"] | {"joint_attention_dim": 256, "num_layers": 1},
    "wan22": NARROW["wan"],
}
CALL = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
MORE = {"wan22": {"num_frames": 5}, "qwen_image": {"negative_prompt": " ", "true_cfg_scale": 4.0}}


@pytest.mark.parametrize("name", CHANGES)
def test_it_draws(tmp_path, name):
    folder = full_size.build(name, tmp_path / name, torch.device("cpu"), **CHANGES[name])
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        drawn = pipe(prompt="a red star", **CALL, **MORE.get(name, {}))[0]
    drawn = drawn if torch.is_tensor(drawn) else torch.as_tensor(drawn)
    assert drawn.isfinite().all() and drawn.std() > 0
    if name == "wan22":
        first, second = (dict(t.named_parameters()) for t in (pipe.transformer, pipe.transformer_2))
        assert not torch.equal(first["proj_out.weight"], second["proj_out.weight"])
