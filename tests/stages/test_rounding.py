"""preset=instant: a packed model from the weights alone."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_line import CALL, model_folder, prompt_file, run, run_stage, stage
from torch.nn.functional import linear

from dirotq.errors import ConfigError, NumericalError, UnsupportedError
from dirotq.kernels.formats.quantize_weight import dequantize_weight, unpack_weight
from dirotq.kernels.linear import QuantLinear
from dirotq.loading import load
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config
from dirotq.quantize import uncalibrated
from dirotq.quantize.nearest import nearest
from dirotq.quantize.plan import read_plan
from dirotq.quantize.rotation import Rotation
from dirotq.quantize.tensors import load_site, site_file
from dirotq.quantize.uncalibrated import guessed_codes, part_of
from dirotq.stages.rounding import round_site


@pytest.fixture(scope="module")
def instant(tiny_root):
    """A line of preset=instant: ``instant("method=rtn")``."""

    def made(*more):
        heldout = (f"path={prompt_file(tiny_root)}", "start=6", "count=2")
        prompts = [f"prompts.heldout.{word}" for word in heldout if "until=validate" in more]
        words = [
            f"model={model_folder(tiny_root)}", f"store={tiny_root / 'store'}", "preset=instant",
            "device=cpu", *prompts, *more,
        ]  # fmt: skip
        return build(compose_config(words, "dirotq.conf"))

    return made


@pytest.fixture(scope="module")
def packed(instant):
    return run(instant("until=validate", "validate.pairs=2", "reference.batch=2"))


def test_it_compresses_and_loads(packed, instant):
    assert list(packed) == ["round", "pack", "reference", "validate"]
    assert [step.name for step in instant().steps] == ["round", "pack"]  # without until=validate
    assert packed["validate"].metrics["psnr"] > 30
    pipe = load(packed["pack"].tree("model"), device="cpu")
    image = pipe("a red circle", **CALL, output_type="pt").images
    assert image.isfinite().all()
    linears = [m for m in pipe.transformer.modules() if isinstance(m, QuantLinear)]
    assert {m.spec.rank for m in linears} == {0}


def test_weights_that_stay_in_16_bits_are_finite_too(own_folder, store_root):
    """No stage of the preset computes with them."""
    (file,) = (own_folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["proj_out.weight"][0, 0] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    words = [f"model={own_folder}", f"store={store_root}", "preset=instant", "device=cpu"]
    with pytest.raises(NumericalError, match="proj_out: the weights hold NaN or infinity"):
        run(build(compose_config(words, "dirotq.conf")))


@pytest.mark.parametrize(
    ("part", "word"),
    [
        ("vae", "text_encoders=keep"),
        ("text_encoder", "text_encoders=keep"),
        ("text_encoder_2", "text_encoders=w8"),
    ],
)
def test_weights_of_other_components_are_finite_too(own_folder, store_root, part, word):
    (file,) = (own_folder / part).glob("*.safetensors")
    tensors = load_file(file)
    name = next(n for n, t in tensors.items() if t.is_floating_point())
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    words = [f"model={own_folder}", f"store={store_root}", "preset=instant", "device=cpu", word]
    with pytest.raises(NumericalError) as refused:
        run(build(compose_config(words, "dirotq.conf")))
    assert f"{file.resolve()}: {name} holds NaN or infinity" in str(refused.value)
    assert not list(store_root.glob("pack/*/manifest.json"))


def test_zeros_of_a_download_that_was_cut_short_are_named(own_folder, store_root, caplog):
    for part in ("transformer", "vae"):
        (file,) = (own_folder / part).glob("*.safetensors")
        tensors = load_file(file)
        for name in [n for n, t in tensors.items() if t.ndim > 1][-3:]:
            tensors[name].zero_()
        save_file(tensors, file, metadata={"format": "pt"})
    words = [f"model={own_folder}", f"store={store_root}", "preset=instant", "device=cpu"]
    run(build(compose_config(words, "dirotq.conf")))
    said = [one.getMessage() for one in caplog.records if "is all zeros" in one.getMessage()]
    assert len(said) == 2  # one for the transformer, one for the autoencoder's file
    assert "transformer: " in said[0]
    assert "vae" in said[1]


def test_a_pipeline_that_can_not_be_called_is_refused_before_anything_runs(own_folder, store_root):
    """Every tensor fits its config.json."""
    config = own_folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"axes_dims_rope": [8, 12, 14]}))
    words = [f"model={own_folder}", f"store={store_root}", "preset=instant", "device=cpu"]
    with pytest.raises(UnsupportedError) as refused:
        build(compose_config(words, "dirotq.conf"))
    said = str(refused.value)
    assert said.startswith(
        "the 16-bit FluxPipeline fails when it is called (RuntimeError: The size"
    )
    assert said.endswith("round.rehearse=false packs without this call")
    packed = run(build(compose_config([*words, "round.rehearse=false"], "dirotq.conf")))
    assert list(packed) == ["round", "pack"]


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        (
            "model_index.json",
            {"_class_name": "FluxControlPipeline"},
            "whether the parts of this FluxControlPipeline fit each other is not known",
        ),
        ("vae/config.json", {}, None),
    ],
)
def test_what_is_no_proof_is_a_warning(own_folder, store_root, caplog, file, values, says):
    """A pipeline may want what nobody gives."""
    path = own_folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    words = [f"model={own_folder}", f"store={store_root}", "preset=instant", "device=cpu"]
    build(compose_config(words, "dirotq.conf"))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert bool(said) == (says is not None)
    assert says is None or says in said[0]


def test_codes_are_those_of_the_weights(packed, instant):
    """Every site's codes stand for its transformed weights, and its loss says how closely."""
    weights, plan = stage(instant(), "round").model.weights(), packed["round"].file("plan.json")
    for entry in read_plan(plan):
        found = load_site(packed["round"].file(f"sites/{site_file(entry.site.name)}"))
        weight, bias = weights.stacked(entry.site)
        main, _ = Rotation.cut({}, entry.spec).weights(weight)
        values = dequantize_weight(*unpack_weight(found["qweight"], found["wscale"]))
        loss = (values - main).square().sum() / main.square().sum()
        assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-4)
        assert loss < 0.03
        assert ("bias" in found) == (bias is not None)


def test_the_report_says_what_calibration_adds(packed):
    report = json.loads(packed["validate"].file("report.json").read_text())
    assert all(site["sqnr_db"] is None for site in report["sites"])
    assert "sqnr_db" not in report["metrics"]
    assert "method=dirotq_w4a8_int8" in report["verdict"]["reasons"][-1]
    page = packed["validate"].file("report.html").read_text()
    assert "packed from its weights alone" in page and "dB on tiny-flux" in page


def test_the_guess_is_better_where_it_is_right():
    """Inputs whose moment is the weights' own: GPTQ by the guess loses less, and never more."""
    torch.manual_seed(0)
    directions = torch.randn(128, 8) @ torch.randn(8, 256)
    w_NK = directions + 0.1 * torch.randn(128, 256)
    x_TK = torch.randn(512, 128) @ w_NK  # what a balanced layer before would write
    spec = _spec(256, 128)
    rounded = nearest(w_NK, spec, clip=True, wp_NR=None, bias_N=None)
    guessed = guessed_codes(w_NK, rounded.codes, rounded.step, "int4")
    want = linear(x_TK, w_NK)
    error = [
        float((linear(x_TK, dequantize_weight(codes, rounded.step)) - want).square().sum())
        for codes in (guessed, rounded.codes)
    ]
    assert error[0] < 0.7 * error[1]


@pytest.mark.parametrize("scales", ["group", "channel"])
def test_a_wide_site_is_rounded_in_parts_and_zeros_stay(monkeypatch, scales):
    monkeypatch.setattr(uncalibrated, "WIDEST", 128)
    torch.manual_seed(0)
    w_NK = torch.randn(64, 384)
    w_NK[:, :128] = 0
    rounded = nearest(w_NK, _spec(384, 64, scales), clip=True, wp_NR=None, bias_N=None)
    codes = guessed_codes(w_NK, rounded.codes, rounded.step, "int4")
    assert not codes[:, :128].any()
    for start in (128, 256):  # each part as if it were alone
        part = slice(start, start + 128)
        steps = rounded.step if scales == "channel" else rounded.step[:, start // 64 :][:, :2]
        alone = guessed_codes(w_NK[:, part], rounded.codes[:, part], steps, "int4")
        assert torch.equal(codes[:, part], alone)


@pytest.mark.parametrize(
    ("columns", "group", "width"),
    [(4096, 64, 4096), (4160, 64, 832), (15360, 64, 3840), (8192, 8192, 4096), (8198, 4099, 8198)],
)
def test_parts_hold_whole_groups(columns, group, width):
    assert part_of(columns, group) == width


def test_another_method_without_statistics(instant):
    metrics = run(instant("method=rtn"))["pack"].metrics
    assert 4 < metrics["bits_per_parameter"] < 16


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("method=dirotq", "method.branch=project, method.sensitive=auto need statistics"),
        ("method=smoothquant", "transform.smooth=true needs"),
        ("capture.calls=64", "the stage capture, which preset=instant leaves out"),
        ("rank.r=32", "the stage rank, which preset=instant leaves out"),
        ("prompts.calibration.count=3", "no stage reads with preset=instant (it runs round, pack)"),
        ("branch=project", "branch=project says something of branch, which no stage reads"),
        ("+model.call.prompt=x", "DiRotQ gives prompt itself"),
        ("until=gptq", "'gptq' is no stage of this pipeline"),
        ("preset=instnat", "preset"),
        ("method=quarot round.least_packed=2", "round.least_packed=2"),
    ],
)
def test_contradictions_are_refused(instant, word, says):
    with pytest.raises(ConfigError) as refused:
        instant(*word.split())
    assert says in str(refused.value)


def test_damaged_weights_are_named(instant, tmp_path, monkeypatch):
    from dirotq.sources import weights

    right = weights.Weights.tensors

    def damaged(self, names, device="cpu"):
        found = right(self, names, device)
        for name in found:
            if "attn" in name:
                found[name] = found[name].clone().fill_(torch.nan)
        return found

    monkeypatch.setattr(weights.Weights, "tensors", damaged)
    with pytest.raises(NumericalError, match="attn"):
        run_stage(stage(instant(), "round"), tmp_path)


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_weights_that_float32_can_not_square_are_named(instant, rounding):
    made = stage(instant(f"method.rounding={rounding}"), "round")
    (entry, *_) = (line for line in made._planned().lines if line.site.kind == "block")
    weight, bias = made.model.weights().stacked(entry.site)
    assert round_site(weight * 1e12, bias, entry)["loss"] < 0.03
    with pytest.raises(NumericalError, match=rf"site {entry.site.name}: its weights reach .*e\+2"):
        round_site(weight * 1e22, bias, entry)


def _spec(columns, outputs, weight_scale="group"):
    from dirotq.kernels.formats.activation import recorded_format as activations
    from dirotq.kernels.formats.spec import QuantSpec
    from dirotq.kernels.formats.transform import NO_TRANSFORM, PROJECT
    from dirotq.kernels.formats.weight import recorded_format as weights

    return QuantSpec(
        in_features=columns, out_features=(outputs,), rank=0, transform=NO_TRANSFORM,
        branch=PROJECT, weights=weights(weight_scale, 64), activations=activations(8, "token", 64),
    )  # fmt: skip
