import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_line import run, run_stage, stage, tree_bytes, with_moment
from tiny_spec import FP4

from dirotq.errors import ConfigError, NumericalError
from dirotq.kernels.formats.lm4 import unpack_lm4
from dirotq.kernels.formats.pack_int4 import unpack_int4
from dirotq.kernels.formats.quantize_weight import dequantize_weight, scale_floor, unpack_weight
from dirotq.quantize.plan import read_plan
from dirotq.quantize.tensors import load_site, save_site, site_file
from dirotq.sources.model import DiffusersModel
from dirotq.stages import gptq as module
from dirotq.stages.gptq import QuantizeWeights

pytestmark = pytest.mark.usefixtures("looks_every_time")

STORED = ("qweight", "wscale", "wglobal")


@pytest.fixture(scope="session")
def gptq(line) -> QuantizeWeights:
    return stage(line(), "gptq")


@pytest.fixture(scope="session")
def inputs(finished):
    return {name: finished[name] for name in ("capture", "basis", "rank")}


def results(finished):
    plan = read_plan(finished["rank"].file("plan.json"))
    return [(e, load_site(finished["gptq"].file(f"sites/{site_file(e.site.name)}"))) for e in plan]


def test_codes_and_scales_of_every_site(finished):
    for entry, found in results(finished):
        codes, scale = unpack_lm4(found["qweight"]), found["wscale"]
        assert codes.shape == (entry.spec.outputs, entry.spec.width)
        assert codes.dtype == torch.int8
        assert entry.spec.weights.element == "lm4"
        assert scale.shape == (entry.spec.outputs, entry.spec.width // entry.spec.weight_group_size)
        assert scale.dtype == torch.bfloat16
        assert (scale > 0).all()


def test_the_loss_is_never_above_that_of_nearest_rounding(finished):
    for entry, found in results(finished):
        ours, nearest = found["loss"].tolist()
        assert 0 < ours <= nearest * (1 + 1e-6), entry.site.name
    metrics = finished["gptq"].metrics
    assert metrics["relative_error"] < 0.7 * metrics["relative_error_nearest"]
    assert metrics["damping_escalations"] == 0
    assert 0 <= metrics["rows_kept_nearest"] < 0.5


@pytest.mark.parametrize("name", FP4)
def test_fp4_sites_hold_bytes_and_modulators_stay_int4(line, name):
    artifacts = run(line(f"method=dirotq_{name}", "until=gptq"))
    for entry, found in results(artifacts):
        if entry.site.kind == "modulator":
            assert found["wscale"].dtype == torch.bfloat16
            continue
        assert found["wscale"].dtype == torch.uint8
        assert ("wglobal" in found) == (name == "nvfp4")
        ours, nearest = found["loss"].tolist()
        assert 0 < ours <= nearest * (1 + 1e-6), entry.site.name
        weight = dequantize_weight(*unpack_weight(*(found.get(b) for b in STORED)))
        assert weight.shape == (entry.spec.outputs, entry.spec.width)
        assert weight.isfinite().all() and weight.any(1).all()
    metrics = artifacts["gptq"].metrics
    assert metrics["relative_error"] < 0.8 * metrics["relative_error_nearest"]
    assert metrics["rows_on_scale_floor"] == 0


def test_rtn_is_nearest_everywhere(line):
    metrics = run(line("method=rtn", "until=gptq"))["gptq"].metrics
    assert metrics["relative_error"] == metrics["relative_error_nearest"]
    assert metrics["rows_kept_nearest"] == 1


def channel_sites(plan, gptq, fuse):
    """(site, scales of gptq, their floor by what fuse stored) where one scale serves an output."""
    for entry in plan:
        if entry.spec.weights.name in ("channel", "lm4_channel"):
            name = site_file(entry.site.name)
            stored = load_site(fuse / "sites" / name)
            floor = scale_floor(stored.get("wp"), stored.get("bias"))
            yield entry.site.name, load_site(gptq / "sites" / name)["wscale"], floor


def test_the_tail_holds_every_row_and_binds_nowhere_in_a_usual_model(finished):
    plan = read_plan(finished["rank"].file("plan.json"))
    found = list(channel_sites(plan, finished["gptq"].data, finished["fuse"].data))
    assert len(found) > 5
    for name, scale, floor in found:
        assert (scale > floor).all(), name
    assert finished["gptq"].metrics["rows_on_scale_floor"] == 0


@pytest.mark.parametrize("method", ["dirotq", "dirotq_dense", "rtn"])
def test_a_large_bias_raises_the_scale_of_its_row(line, own_folder, tmp_path, method):
    (file,) = (own_folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    linear = "single_transformer_blocks.0.attn.to_k"
    tensors[f"{linear}.bias"][3] = 900.0
    tensors[f"{linear}.weight"][5] = 0.0
    save_file(tensors, file, metadata={"format": "pt"})
    model = DiffusersModel(path=str(own_folder), call={})
    built, inputs = line(f"method={method}"), {}
    for name, artifact in run(line(f"method={method}", "until=rank")).items():
        inputs[name] = artifact
    metrics = run_stage(
        dataclasses.replace(stage(built, "gptq"), model=model), tmp_path / "gptq", **inputs
    )
    plan = read_plan(inputs["rank"].file("plan.json"))
    entry = next(e for e in plan if f"{linear}" in e.site.linears)
    _, rows = next(part for part in entry.site.slices() if part[0] == linear)
    found = load_site(tmp_path / "gptq" / "sites" / site_file(entry.site.name))
    row, zero = rows.start + 3, rows.start + 5
    if entry.spec.weights.name == "group":
        assert metrics["rows_on_scale_floor"] == 0
        return
    assert found["wscale"][row] >= 900 / 2048
    assert found["wscale"][zero] > 0
    element = entry.spec.weights.element
    unpacked = {"int4": unpack_int4, "lm4": unpack_lm4}[element](found["qweight"][zero])
    assert unpacked.abs().max() <= {"int4": 0, "lm4": 13}[element]  # levels have no zero
    rows_in_all = sum(e.spec.outputs for e in plan)
    assert metrics["rows_on_scale_floor"] == pytest.approx(2 / rows_in_all)


@pytest.mark.parametrize("sites", [1, 7])
def test_an_interrupted_run_goes_on_at_the_next_site(gptq, inputs, tmp_path, monkeypatch, sites):
    run_stage(gptq, tmp_path / "undisturbed", **inputs)
    saved = []

    def counted(folder, site, tensors):
        if len(saved) == sites and not (tmp_path / "power is back").exists():
            raise KeyboardInterrupt
        saved.append(site)
        return save_site(folder, site, tensors)

    monkeypatch.setattr(module, "save_site", counted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(gptq, tmp_path / "resumed", **inputs)
    (tmp_path / "power is back").touch()
    metrics = run_stage(gptq, tmp_path / "resumed", **inputs)
    assert len(saved) == len(set(saved)) == metrics["sites"]
    assert tree_bytes(tmp_path / "resumed") == tree_bytes(tmp_path / "undisturbed")


@pytest.mark.parametrize("linear", ["attn.to_k", "proj_mlp", "norm.linear"])
def test_weights_that_are_not_finite_name_their_linear(gptq, inputs, own_folder, tmp_path, linear):
    (file,) = (own_folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors[f"single_transformer_blocks.0.{linear}.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    broken = dataclasses.replace(gptq, model=DiffusersModel(path=str(own_folder), call={}))
    with pytest.raises(NumericalError, match=rf"single.*\.0\.{linear}: the weights hold NaN"):
        run_stage(broken, tmp_path / "out", **inputs)


def test_a_moment_that_cannot_be_factored_names_its_site(gptq, inputs, store_root):
    site = "transformer_blocks.0.ff.net.0.proj"
    capture = with_moment(inputs["capture"], store_root, site, lambda s: -s)
    with pytest.raises(NumericalError, match=rf"site {site}: .*not positive.*gptq\.damping") as e:
        run_stage(gptq, store_root / "out", **inputs | {"capture": capture})
    assert "capture.calls" in str(e.value)


def test_an_escalation_of_the_damping_is_reported(gptq, inputs, store_root):
    site = "transformer_blocks.0.norm1.linear"  # a modulator: its moment is not rotated

    def slightly_indefinite(s):
        s = torch.eye(len(s))
        s[5, 5] = -0.05
        return s

    capture = with_moment(inputs["capture"], store_root, site, slightly_indefinite)
    metrics = run_stage(gptq, store_root / "out", **inputs | {"capture": capture})
    assert metrics["damping_escalations"] == 1


@pytest.mark.parametrize("damping", [0.0, -0.1, 1.5])
def test_damping_out_of_range(gptq, damping):
    with pytest.raises(ConfigError, match=rf"gptq\.damping={damping}.*0 < damping <= 1"):
        dataclasses.replace(gptq, damping=damping)
