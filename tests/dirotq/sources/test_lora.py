import json
import logging
import math

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sources import *  # noqa: F403
from tiny_sources import PROJ, Q, model, noise, tensors_of

from dirotq.errors import ArtifactError, ConfigError, NumericalError, UnsupportedError


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


SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        # The first pattern counts that matches a name's end, from a dot on: {Q: .., PROJ: ..}
        ({"alpha_pattern": {"single_transformer_blocks.*proj_mlp": 1}}, (6 / 4, 1 / 4)),
        ({"alpha_pattern": {".*to_[qk]": 2, "to_q": 3}}, (2 / 4, 6 / 4)),
        ({"alpha_pattern": {"attn.to_q": 2, "o_q": 3, "q": 5}}, (2 / 4, 6 / 4)),
        ({"alpha_pattern": {"o_q": 3, "to": 5, "proj": 7}}, (6 / 4, 6 / 4)),
        ({"alpha_pattern": {f"^{Q}": 3, "^proj_mlp": 5}}, (3 / 4, 6 / 4)),
        ({"alpha_pattern": {"to_q|proj_mlp": 3}, "use_rslora": True}, (3 / 2, 3 / 2)),
        ({"r": 16, "rank_pattern": {"to_q|proj_mlp": 4}}, (6 / 4, 6 / 4)),
        ({"r": 16, "rank_pattern": {".*blocks.*": 4}, "use_rslora": True}, (6 / 2, 6 / 2)),
        ({"lora_alpha": -2.5}, (-2.5 / 4, -2.5 / 4)),
        ({"alpha_pattern": {}, "rank_pattern": None, "bias": "none"}, (6 / 4, 6 / 4)),
    ],
)
@pytest.mark.parametrize("beside", [True, False])
def test_alphas_are_those_of_peft(folder, lora, tmp_path, settings, scales, beside):
    values = SETTINGS | settings
    if beside:
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        file = lora(
            down="base_model.model.{}.lora_A.weight", up="base_model.model.{}.lora_B.weight"
        )
    else:
        noted = json.dumps({f"transformer.{k}": v for k, v in values.items()})
        file = lora(metadata={"lora_adapter_metadata": noted})
    before, after = tensors_of(folder), tensors_of(model(folder, lora=str(file)).folder())
    for module, scale in zip((Q, PROJ), scales):
        weight = before[f"{module}.weight"]
        rows, width = weight.shape
        exact = weight.double() + scale * (noise(rows, 4) / 10).double() @ noise(4, width).double()
        torch.testing.assert_close(
            after[f"{module}.weight"], exact.to(weight.dtype), rtol=2**-7, atol=0
        )
        change = (after[f"{module}.weight"].double() - weight.double()).norm()
        assert change.item() == pytest.approx((exact - weight.double()).norm().item(), rel=0.02)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"r": 8}, ConfigError, "notes the rank 8 for .*, whose tensors have rank 4"),
        ({"rank_pattern": {"to_q": 2}}, ConfigError, "notes the rank 2 for .*to_q"),
        ({"lora_alpha": math.nan}, ConfigError, "a value is NaN"),
        ({"lora_alpha": 0}, ConfigError, "the alpha of .* is 0.0"),
        ({"lora_alpha": "6"}, ConfigError, "the alpha of .* is '6', not a number"),
        ({"alpha_pattern": {"to_q": True}}, ConfigError, "the alpha of .* is True"),
        ({"alpha_pattern": {"to_q": 10**400}}, ConfigError, "the alpha of .* is inf"),
        ({"alpha_pattern": {"(to_q": 1}}, ConfigError, "no regular expression"),
        ({"alpha_pattern": {"(.*)*x": 1}}, ConfigError, "repetitions within repetitions"),
        ({"alpha_pattern": ["to_q"]}, ConfigError, "not a mapping of names"),
        ({"peft_type": "LOHA"}, UnsupportedError, "peft_type='LOHA'"),
        ({"use_dora": True}, UnsupportedError, "use_dora=True"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedError, "init_lora_weights='pissa_nite"),
        (None, ConfigError, "is no JSON object"),
        ("{", ConfigError, "is damaged"),
        ("[" * 10**5, ConfigError, "is damaged"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(folder, lora, tmp_path, settings, error, message):
    text = settings if isinstance(settings, str) else json.dumps(settings and SETTINGS | settings)
    with pytest.raises(error, match=message):
        model(folder, lora=str(lora(metadata={"lora_adapter_metadata": text}))).folder()
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(error, match=message):
        model(folder, lora=str(lora())).folder()


def test_settings_and_alphas_of_two_loras(folder, lora, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS | {"lora_alpha": 8}))
    file = lora(alpha="transformer.{}.alpha")  # 8 too
    assert model(folder, lora=str(file)).folder().is_dir()
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(ConfigError, match=r"alpha, which scales by 2\.0, and .* says 1\.5"):
        model(folder, lora=str(file)).folder()


def test_what_was_added_otherwise_has_another_fingerprint(folder, lora, tmp_path):
    """The rules for them changed; what was compressed with plain alphas stays right."""
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    plain = model(folder, lora=str(lora())).identity()["lora"]
    assert [sorted(entry) for entry in plain] == [["files", "weight"]]
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(SETTINGS | {"alpha_pattern": {"to_q": 6}})
    )
    assert model(folder, lora=str(lora())).identity()["lora"][0]["rules"] == 2
    (tmp_path / "adapter_config.json").unlink()
    save_file(kohya("lora_unet_final_layer_linear", 64, 16), tmp_path / "last.safetensors")
    last = model(folder, lora=str(tmp_path / "last.safetensors")).identity()["lora"]
    assert last[0]["rules"] == 2


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


QKV = "lora_unet_double_blocks_0_img_attn_qkv"
PROJ_IN_KOHYA = "lora_unet_double_blocks_0_img_attn_proj"


def kohya(stem, width, rows, alpha=2.0, rank=4):
    return {
        f"{stem}.lora_down.weight": noise(rank, width),
        f"{stem}.lora_up.weight": noise(rows, rank),
        f"{stem}.alpha": torch.tensor(alpha),
    }


def test_two_layouts_in_one_file_are_all_used(folder, lora, tmp_path):
    tensors = load_file(lora()) | kohya(PROJ_IN_KOHYA, 64, 64) | kohya(QKV, 64, 192)
    save_file(tensors, tmp_path / "both.safetensors")
    with pytest.raises(ConfigError, match=r"holds .*to_q under two names, of two layouts"):
        model(folder, lora=str(tmp_path / "both.safetensors")).folder()
    tensors = {key: t for key, t in tensors.items() if ".to_q." not in key}
    save_file(tensors, tmp_path / "both.safetensors")
    before = tensors_of(folder)
    after = tensors_of(model(folder, lora=str(tmp_path / "both.safetensors")).folder())
    attention = "transformer_blocks.0.attn"
    assert [n for n in sorted(before) if not torch.equal(before[n], after[n])] == [
        f"{PROJ}.weight",
        *(f"{attention}.{name}.weight" for name in ("to_k", "to_out.0", "to_q", "to_v")),
    ]
    assert torch.equal(after[f"{PROJ}.weight"], expected(folder, PROJ, 1.0))
    up = tensors[f"{QKV}.lora_up.weight"][64:128]
    wanted = before[f"{attention}.to_k.weight"].double() + 0.5 * (up @ noise(4, 64)).double()
    torch.testing.assert_close(
        after[f"{attention}.to_k.weight"].double(), wanted, rtol=2**-7, atol=2**-8
    )


@pytest.mark.parametrize("alpha", [1e-3, 3.0, -2.0])
def test_alphas_of_kohya_are_worked_in_before_the_converter(folder, tmp_path, alpha):
    """It leaves out that of the final layer, and a negative one makes it count for ever."""
    stems = {"lora_unet_final_layer_linear": "proj_out", PROJ_IN_KOHYA: f"{Q[:-4]}to_out.0"}
    before = tensors_of(folder)
    shapes = {stem: before[f"{module}.weight"].shape for stem, module in stems.items()}
    tensors = {}
    for stem, (rows, width) in shapes.items():
        tensors |= kohya(stem, width, rows, alpha)
    save_file(tensors, tmp_path / "kohya.safetensors")
    after = tensors_of(model(folder, lora=str(tmp_path / "kohya.safetensors")).folder())
    for stem, module in stems.items():
        weight = before[f"{module}.weight"].double()
        up, down = (tensors[f"{stem}.lora_{side}.weight"].double() for side in ("up", "down"))
        torch.testing.assert_close(
            after[f"{module}.weight"].double(),
            weight + alpha / 4 * up @ down,
            rtol=2**-7,
            atol=1e-2,
        )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"lora_unet_double_blocks_0_img_mlp_0.diff_b": torch.ones(4)}, r"passes over 1 tensors"),
        ({"lora_prior_x.weight": torch.ones(4, 4)}, "passes over 1 tensors, such as .*lora_prior"),
    ],
)
def test_what_a_converter_leaves_out_in_silence_is_refused(folder, tmp_path, extra, message):
    file = tmp_path / "kohya.safetensors"
    save_file(kohya(PROJ_IN_KOHYA, 64, 64) | extra, file)
    with pytest.raises(ConfigError, match=message):
        model(folder, lora=str(file)).folder()
    nothing = {key: torch.zeros_like(tensor) for key, tensor in extra.items()}
    save_file(kohya(PROJ_IN_KOHYA, 64, 64) | nothing, file)
    assert model(folder, lora=str(file)).folder().is_dir()


@pytest.mark.parametrize(
    "stem", [QKV, "lora_unet_single_blocks_0_linear1", "lora_unet_double_blocks_0_img_mlp_0"]
)
def test_a_kohya_lora_of_another_width(folder, tmp_path, stem):
    save_file(kohya(stem, 96, 96), tmp_path / "kohya.safetensors")
    with pytest.raises(ConfigError, match=r"is a LoRA for another model.*(to_q|single|ff\.net)"):
        model(folder, lora=str(tmp_path / "kohya.safetensors")).folder()


def test_two_adapters_in_one_file(folder, lora, tmp_path):
    tensors = load_file(lora(down="transformer.{}.lora_A.default.weight"))
    other = {f"transformer.{Q}.lora_A.other-1.weight": torch.ones(4, 64)}
    save_file(tensors | other, tmp_path / "two.safetensors")
    with pytest.raises(ConfigError, match=r"two tensors for one place.*default.*other-1"):
        model(folder, lora=str(tmp_path / "two.safetensors")).folder()


@pytest.mark.parametrize(
    ("down", "up", "error", "message"),
    [
        (torch.ones(4, 64, 1, 1), torch.ones(64, 4, 1, 1), None, ""),
        (torch.ones(4, 16, 2, 2), torch.ones(64, 4), ConfigError, r"changes \[64, 16, 2, 2\]"),
        (torch.ones(4, 64), torch.ones(64, 2, 2), ConfigError, "don't make a pair"),
        (torch.ones(0, 64), torch.ones(64, 0), ConfigError, "don't make a pair"),
        (torch.ones(64), torch.ones(64, 4), ConfigError, "don't make a pair"),
        (torch.tensor(1.0), torch.ones(64, 4), ConfigError, "don't make a pair"),
        (torch.ones(4, 64, dtype=torch.int8), torch.ones(64, 4), UnsupportedError, "torch.int8"),
        (torch.ones(4, 64, dtype=torch.complex64), torch.ones(64, 4), UnsupportedError, "complex"),
        (torch.ones(4, 64).to(torch.float8_e4m3fn), torch.ones(64, 4), UnsupportedError, "float8"),
        (torch.full((4, 64), math.inf), torch.ones(64, 4), NumericalError, "holds NaN or infinity"),
    ],
)
def test_odd_matrices(folder, tmp_path, down, up, error, message):
    file = tmp_path / "odd.safetensors"
    save_file({f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up}, file)
    if error is None:
        assert model(folder, lora=str(file)).folder().is_dir()
        return
    with pytest.raises(error, match=message):
        model(folder, lora=str(file)).folder()


@pytest.mark.parametrize(
    "alpha", [torch.ones(2), torch.tensor(0.0), torch.tensor(math.nan), torch.tensor(1j)]
)
def test_odd_alphas(folder, lora, alpha):
    file = lora(**{f"transformer.{Q}.alpha": alpha})
    with pytest.raises(ConfigError, match=r"to_q\.alpha is "):
        model(folder, lora=str(file)).folder()


def test_a_bias_is_no_product(folder, lora):
    file = lora(**{f"transformer.{Q}.lora_B.bias": torch.ones(64)})
    with pytest.raises(UnsupportedError, match=r"more than pairs of matrices: 1 .*lora_B\.bias"):
        model(folder, lora=str(file)).folder()


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


@pytest.mark.parametrize(
    "given",
    [5, [5], {"weight": 1}, [{"path": "x", "scale": 1}],
     *([{"path": "x", "weight": w}] for w in (True, math.nan, math.inf, 10**400, "1", None))],
)  # fmt: skip
def test_a_lora_is_a_path_and_a_weight(given):
    with pytest.raises(ConfigError, match=r"is no LoRA; write model\.lora=FILE"):
        model("x", lora=given)
