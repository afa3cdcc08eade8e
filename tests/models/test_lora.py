import json
import logging

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sources import *  # noqa: F403
from tiny_sources import PROJ, Q, model, noise, tensors_of

from dirotq.errors import ArtifactError, ConfigError, UnsupportedError


def expected(folder, module, scale):
    weight = tensors_of(folder)[f"{module}.weight"]
    rows, width = weight.shape
    update = scale * ((noise(rows, 4) / 10) @ noise(4, width))
    return (weight.float() + update).to(weight.dtype)


@pytest.mark.parametrize(
    ("layout", "scale"),
    [
        ({}, 1.0),
        ({"alpha": "transformer.{}.alpha"}, 2.0),
        ({"down": "{}.lora_A.weight", "up": "{}.lora_B.weight"}, 1.0),
        ({"down": "base_model.model.{}.lora_A.default.weight",
          "up": "base_model.model.{}.lora_B.default.weight"}, 1.0),
        ({"down": "transformer.{}.lora.down.weight", "up": "transformer.{}.lora.up.weight",
          "alpha": "transformer.{}.alpha"}, 2.0),
        ({"metadata": {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6})}}, 1.5),
        ({"metadata": {"lora_adapter_metadata": json.dumps(
            {"transformer.lora_alpha": 6, "transformer.use_rslora": True})}}, 3.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_lora_is_added_and_nothing_else_changes(folder, lora, layout, scale, weight):
    path = str(lora(**layout))
    made = model(folder, lora=[{"path": path, "weight": weight}]).folder()
    before, after = tensors_of(folder), tensors_of(made)
    assert before.keys() == after.keys()
    for module in (Q, PROJ):
        assert torch.equal(after[f"{module}.weight"], expected(folder, module, weight * scale))
    for name in before.keys() - {f"{Q}.weight", f"{PROJ}.weight"}:
        assert torch.equal(before[name], after[name])
        assert before[name].dtype == after[name].dtype


def test_alphas_beside_the_file(folder, lora, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"lora_alpha": 2, "alpha_pattern": {PROJ: 4}})
    )
    after = tensors_of(model(folder, lora=str(lora())).folder())
    assert torch.equal(after[f"{Q}.weight"], expected(folder, Q, 0.5))
    assert torch.equal(after[f"{PROJ}.weight"], expected(folder, PROJ, 1.0))


def test_two_loras_are_rounded_once(folder, lora):
    a, b = str(lora()), str(lora(name="b.safetensors", alpha="transformer.{}.alpha"))
    after = tensors_of(model(folder, lora=[a, {"path": b, "weight": -0.25}]).folder())
    assert torch.equal(after[f"{Q}.weight"], expected(folder, Q, 0.5))


def test_a_kohya_lora_is_converted_by_diffusers(folder, tmp_path):
    """sd-scripts: fused qkv, underscores, one alpha a module."""
    before = tensors_of(folder)
    rows, width = before["transformer_blocks.0.attn.to_out.0.weight"].shape
    down, up = noise(4, width), noise(rows, 4)
    stem = "lora_unet_double_blocks_0_img_attn_proj"
    save_file(
        {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
         f"{stem}.alpha": torch.tensor(2.0)}, tmp_path / "kohya.safetensors")  # fmt: skip
    after = tensors_of(model(folder, lora=str(tmp_path / "kohya.safetensors")).folder())
    name = "transformer_blocks.0.attn.to_out.0.weight"
    torch.testing.assert_close(
        after[name].float(), before[name].float() + 0.5 * up @ down, rtol=0.01, atol=0.01
    )
    assert [n for n in before if not torch.equal(before[n], after[n])] == [name]


def test_what_a_converter_does_not_know_is_refused(folder, tmp_path):
    stems = ("lora_unet_double_blocks_0_img_attn_proj", "lora_unet_unheard_of")
    parts = (("lora_down.weight", (4, 64)), ("lora_up.weight", (64, 4)), ("alpha", ()))
    tensors = {f"{stem}.{part}": torch.ones(shape) for stem in stems for part, shape in parts}
    save_file(tensors, tmp_path / "kohya.safetensors")
    with pytest.raises(ConfigError, match=r"for another model.*lora_unet_unheard_of \(no such"):
        model(folder, lora=str(tmp_path / "kohya.safetensors")).folder()


def test_what_a_converter_leaves_out_with_a_warning_is_refused(folder, lora, monkeypatch, capfd):
    def convert(tensors):
        logging.getLogger("diffusers.loaders.lora_conversion_utils").warning("Unsupported: odd.x")
        return {key.replace("odd", "transformer"): t for key, t in tensors.items()}

    monkeypatch.setattr(diffusers.FluxPipeline, "lora_state_dict", convert)
    file = lora(down="odd.{}.lora_A.weight", up="odd.{}.lora_B.weight")
    with pytest.raises(ConfigError, match=r"as a whole by diffusers.* Unsupported: odd\.x"):
        model(folder, lora=str(file)).folder()
    assert "Unsupported" not in capfd.readouterr().err


def test_a_lora_for_another_model(folder, tmp_path):
    file = tmp_path / "other.safetensors"
    save_file(
        {f"transformer.{m}.lora_{side}.weight": torch.ones(s)
         for m in ("blocks.7.attn", Q)
         for side, s in (("A", (4, 32)), ("B", (96, 4)))}, file)  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"for another model: 2 of its 2 .*blocks\.7\.attn \(no such"
        r".*to_q \(changes \[96, 32\], is \[64, 64\]\).*trained on"
    ):  # fmt: skip
        model(folder, lora=str(file)).folder()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"text_encoder.layers.0.q.lora_A.weight": torch.ones(4, 8)}, "changes text encoders"),
        ({"lora_te1_text_model_q.lora_down.weight": torch.ones(4, 8)}, "changes text encoders"),
        ({f"transformer.{Q}.dora_scale": torch.ones(4)}, "is a DoRA"),
        ({f"transformer.{Q}.lokr_w1": torch.ones(4)}, "is a LoKr"),
    ],
)
def test_kinds_that_are_refused(folder, lora, extra, message):
    with pytest.raises(UnsupportedError, match=message):
        model(folder, lora=str(lora(**extra))).folder()


def test_half_a_pair(folder, lora, tmp_path):
    tensors = load_file(lora())
    del tensors[f"transformer.{Q}.lora_B.weight"]
    save_file(tensors, tmp_path / "half.safetensors")
    with pytest.raises(ConfigError, match=r"1 of its 2 parts.*to_q \(its halves don't make a pair"):
        model(folder, lora=str(tmp_path / "half.safetensors")).folder()


def test_no_lora_at_all(folder, tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"no LoRA that is understood.*'weight'"):
        model(folder, lora=str(tmp_path / "x.safetensors")).folder()


def test_lora_files_are_checked_by_the_plan(folder, lora, tmp_path):
    with pytest.raises(ConfigError, match=r"no such file"):
        model(folder, lora="absent.safetensors").identity()
    (tmp_path / "x.bin").touch()
    with pytest.raises(ConfigError, match=r"only: a pickle can run code"):
        model(folder, lora=str(tmp_path / "x.bin")).identity()
    file = lora()
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="damaged"):
        model(folder, lora=str(file)).identity()


@pytest.mark.parametrize("given", [5, [5], {"weight": 1}, [{"path": "x", "scale": 1}]])
def test_a_lora_is_a_path_and_a_weight(given):
    with pytest.raises(ConfigError, match=r"is no LoRA; write model\.lora=FILE"):
        model("x", lora=given)
