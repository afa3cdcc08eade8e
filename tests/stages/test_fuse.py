import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import zarr
from tiny_line import publish, run_stage, stage
from torch.nn.functional import linear

from dirotq.errors import ArtifactError, ConfigError, NumericalError
from dirotq.models.call import PROBE, call_files
from dirotq.pipeline.artifact import Artifact
from dirotq.quantize.plan import read_plan
from dirotq.quantize.rotation import Rotation
from dirotq.quantize.tensors import load_site, read_array, save_site, site_file
from dirotq.stages import fuse as module
from dirotq.stages.fuse import Fuse, FusedLinear, relative_error

FF = "transformer_blocks.0.ff.net.0.proj"
PROBE_FILES = [file.name for file in call_files(Path(), PROBE)]
"""Files of the call that the proof of the network runs."""


@pytest.fixture(scope="session")
def fuse(line) -> Fuse:
    return stage(line(), "fuse")


@pytest.fixture(scope="session")
def inputs(finished):
    return {name: finished[name] for name in ("capture", "basis", "rank")}


def test_what_is_stored_is_the_rotation_in_bf16(finished, fuse):
    weights = fuse.model.weights()
    for entry in read_plan(finished["rank"].file("plan.json")):
        stored = load_site(finished["fuse"].file(f"sites/{site_file(entry.site.name)}"))
        assert all(t.dtype == torch.bfloat16 for t in stored.values())
        weight, bias = weights.stacked(entry.site)
        assert torch.equal(stored["bias"].float(), bias)  # a bf16 model: nothing is rounded
        if entry.site.kind == "modulator":
            assert set(stored) == {"bias"}
            continue
        assert set(stored) == {"basis", "wp", "bias"}
        want = weight @ stored["basis"].float()
        assert relative_error(stored["wp"].float(), want) < 0.01


def test_the_proof_is_tight(finished, fuse):
    metrics = finished["fuse"].metrics
    assert 0 < metrics["layer_error"] < 1e-6 < fuse.layer_tolerance
    assert 0 < metrics["network_error"] < 1e-5 < fuse.network_tolerance
    assert 0 < metrics["wp_rounding"] < 2**-8


def test_a_fused_linear_is_the_linear(finished, fuse):
    weights = fuse.model.weights()
    rows = zarr.open_group(finished["capture"].tree("rows.zarr"), mode="r")
    entry = next(e for e in read_plan(finished["rank"].file("plan.json")) if e.site.name == FF)
    weight, bias = weights.stacked(entry.site)
    vectors = load_site(finished["basis"].file(f"sites/{site_file(FF)}"))["vectors"]
    fused = FusedLinear(Rotation.cut({"vectors": vectors}, entry.spec), weight, bias)
    x = read_array(rows, FF).float()
    assert relative_error(fused(x), linear(x, weight, bias)) < 1e-5
    torch.testing.assert_close(fused(x, rows=slice(3, 9)), fused(x)[:, 3:9], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", [0, 1], ids=["main", "protected"])
def test_a_weight_that_is_wrong_by_a_thousandth_names_the_site(
    fuse, inputs, tmp_path, monkeypatch, half
):
    right = Rotation.weights

    def tampered(self, weight):
        halves = list(right(self, weight))
        if self.spec.out_features == (256,):
            halves[half] = halves[half] * 1.001
        return tuple(halves)

    monkeypatch.setattr(Rotation, "weights", tampered)
    with pytest.raises(NumericalError, match=rf"site {FF}: fused and original outputs differ"):
        run_stage(fuse, tmp_path, **inputs)


def test_streams_wired_to_each_others_sites_fail_the_network(fuse, inputs, tmp_path, monkeypatch):
    def crossed(transformer, sites, build):
        right(transformer, sites, build)
        attention = transformer.transformer_blocks[0].attn
        if not hasattr(attention.to_q, "site") or not hasattr(attention.add_q_proj, "site"):
            return  # another block's turn
        attention.to_q, attention.add_q_proj = attention.add_q_proj, attention.to_q

    right = module.swap_sites
    monkeypatch.setattr(module, "swap_sites", crossed)
    with pytest.raises(NumericalError, match=r"fused network and the original differ.*captured"):
        run_stage(fuse, tmp_path, **inputs)


def test_a_basis_that_is_not_finite_names_the_site(fuse, inputs, store_root):
    def write(data):
        shutil.copytree(inputs["basis"].data, data, dirs_exist_ok=True)
        content = load_site(data / "sites" / site_file(FF))
        content["vectors"][5, -1] = float("nan")
        save_site(data / "sites", FF, content)

    basis = publish(store_root, "basis", write)
    with pytest.raises(NumericalError, match=rf"site {FF}: .* differ by nan"):
        run_stage(fuse, store_root / "out", **inputs | {"basis": basis})


@pytest.mark.parametrize(
    ("stage", "file"),
    [("basis", f"sites/{site_file(FF)}"), *(("capture", file) for file in PROBE_FILES)],
)
def test_a_byte_changed_on_disk_is_noticed_before_it_is_used(fuse, inputs, tmp_path, stage, file):
    whole = inputs[stage]
    copy = shutil.copytree(whole.path, tmp_path / whole.fingerprint)
    content = bytearray((copy / "data" / file).read_bytes())
    content[-100] ^= 1
    (copy / "data" / file).write_bytes(content)
    damaged = Artifact(whole.stage, whole.fingerprint, copy)
    with pytest.raises(ArtifactError, match=rf"{Path(file).name} changed after it was written"):
        run_stage(fuse, tmp_path / "out", **inputs | {stage: damaged})


@pytest.mark.parametrize(
    ("tolerance", "message"),
    [
        ("layer_tolerance", r"site transformer_blocks.* more than fuse\.layer_tolerance=1e-30"),
        ("network_tolerance", r"network and the original.* than fuse\.network_tolerance=1e-30"),
    ],
)
def test_tolerances_are_obeyed(fuse, inputs, tmp_path, tolerance, message):
    strict = dataclasses.replace(fuse, **{tolerance: 1e-30})
    with pytest.raises(NumericalError, match=message):
        run_stage(strict, tmp_path, **inputs)


@pytest.mark.parametrize("tolerance", ["layer_tolerance", "network_tolerance"])
def test_a_tolerance_of_nothing_is_refused(fuse, tolerance):
    with pytest.raises(ConfigError, match="must be positive"):
        dataclasses.replace(fuse, **{tolerance: 0.0})


def test_relative_error():
    want = torch.tensor([3.0, 4.0])
    assert relative_error(want + torch.tensor([0.0, 0.5]), want) == pytest.approx(0.1)
    assert relative_error(want, want) == 0
