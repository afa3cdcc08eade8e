"""Export each method that a format holds, read the file back by an independent reader."""

import functools
import shutil

import pytest
import torch
from exported import MODULATORS, NATIVE, ExportedFile, nibbles, nvfp4_weight
from tiny_line import run

import dirotq
from dirotq.errors import ArtifactError, ConfigError, UnsupportedError
from dirotq.files.json_file import read_json
from dirotq.files.sums import SUMS, write_sums
from dirotq.kernels.engine import reference
from dirotq.kernels.formats.quantize_weight import dequantize_weight, unpack_weight
from dirotq.kernels.linear import QuantLinear
from dirotq.pipeline.disk import write_json

INTEGERS = ("weight_format=int4_channel",)
CONVROT = ("method=convrot", "weight_format=int4_channel", "act_format=int4_token")
INT8 = (*CONVROT[:2], "act_format=int8_token")
CASES = {
    "convrot": ("convrot_w4a4", CONVROT),
    "convrot-int8": ("convrot_w4a4", INT8),
    "absorb": ("svdquant_w4a4", ("method=absorb",)),
    "rank 24": ("svdquant_w4a4", ("method=absorb", "rank.r=24")),
    "rtn": ("svdquant_w4a4", ("method=rtn",)),
}
SMOOTHED = {
    "svdquant": ("svdquant_w4a4", ("method=svdquant",)),
    "smoothquant": ("svdquant_w4a4", ("method=smoothquant",)),
}
FLOATS = {
    "nvfp4": ("nvfp4", ("method=rtn_nvfp4",)),
    "comfy_nvfp4": ("comfy_nvfp4", ("method=rtn_nvfp4",)),
    "gptq": ("nvfp4", ("method=dirotq_nvfp4", "method.branch=null")),
}


@pytest.fixture(scope="module")
def exported(line, tmp_path_factory):
    """``exported(format, words)``: the file, and the packed sites of the model it was made of."""

    @functools.cache
    def make(format, words):
        packed = run(line(*words, "until=pack"))["pack"]
        file = tmp_path_factory.mktemp("exports") / "tiny.safetensors"
        done = dirotq.export(packed.path, format, out=file)
        assert done.size == file.stat().st_size
        transformer = dirotq.load(packed.path, device="cpu").transformer
        sites = {n: m for n, m in transformer.named_modules() if isinstance(m, QuantLinear)}
        return ExportedFile(file), sites, transformer

    return make


def rows_of(linear, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(48, linear.spec.in_features)
    x[:, ::29] *= 8
    return x


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("case", CASES)
def test_codes_are_equal_and_outputs_agree(exported, case):
    file, sites, _ = exported(*CASES[case])
    for native, name in NATIVE.items():
        linear = sites[name]
        codes, _ = unpack_weight(linear.qweight, linear.wscale, linear.wglobal)
        assert torch.equal(nibbles(file.layer(native)["weight"]), codes.double()), native
        x = rows_of(linear)
        ours = reference(x, linear.packed(), linear.spec).double()
        assert relative(file.linear(native, x), ours) < 1e-3, native


@pytest.mark.parametrize("case", SMOOTHED)
def test_smoothing_factors_are_inverted_to_sixteen_bits(exported, case):
    file, sites, _ = exported(*SMOOTHED[case])
    for native, name in NATIVE.items():
        linear, x = sites[name], rows_of(sites[name])
        found = file.layer(native)
        product = found["smooth_factor"].double() * linear.smooth.double()
        assert float((product - 1).abs().max()) <= 2.0**-8
        # The format's own numbers: the same linear with the factors that the file can hold.
        packed = linear.packed()._replace(smooth=found["smooth_factor"].double().reciprocal())
        ours = reference(x.double(), packed, linear.spec)
        assert relative(file.linear(native, x), ours) < 1e-3, native
        codes, _ = unpack_weight(linear.qweight, linear.wscale, None)
        assert torch.equal(nibbles(found["weight"]), codes.double())


@pytest.mark.parametrize("case", FLOATS)
def test_nvfp4_weights_are_equal(exported, case):
    file, sites, _ = exported(*FLOATS[case])
    for native, name in NATIVE.items():
        linear, found = sites[name], file.layer(native)
        codes, steps = unpack_weight(linear.qweight, linear.wscale, linear.wglobal)
        weight = nvfp4_weight(found, tiled=case == "comfy_nvfp4")
        ours = dequantize_weight(codes, steps).double()
        torch.testing.assert_close(weight, ours, rtol=2.0**-22, atol=0)
        assert torch.equal(found["bias"], linear.bias)
        assert ("input_scale" in found) == (case != "comfy_nvfp4")


def test_the_reader_of_diffusers_finds_the_same_nvfp4_weights(exported):
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    file, sites, _ = exported(*FLOATS["nvfp4"])
    for native, name in NATIVE.items():
        linear, found = sites[name], file.layer(native)
        weight = utils.dequantize_nvfp4(
            found["weight"], found["weight_scale"], found["weight_scale_2"]
        )
        codes, steps = unpack_weight(linear.qweight, linear.wscale, linear.wglobal)
        torch.testing.assert_close(weight, dequantize_weight(codes, steps), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", ["convrot", "absorb"])
def test_modulators_are_exact(exported, case):
    file, sites, _ = exported(*CASES[case])
    for native, name in MODULATORS.items():
        linear = sites[name]
        assert file.record(native)["format"] == "awq_w4a16"
        x = rows_of(linear)[:3]
        ours = reference(x.double(), linear.packed(), linear.spec)
        assert relative(file.linear(native, x), ours.double()) < 1e-6


def test_modulators_that_a_format_lacks_are_rounded_to_bfloat16(exported):
    file, sites, _ = exported(*FLOATS["nvfp4"])
    for native, name in MODULATORS.items():
        linear = sites[name]
        codes, steps = unpack_weight(linear.qweight, linear.wscale, None)
        assert file.record(native) is None
        assert torch.equal(
            file.tensors[f"{native}.weight"], dequantize_weight(codes, steps).bfloat16()
        )


def test_layers_in_sixteen_bits_are_the_stored_ones(exported):
    file, _, transformer = exported(*CASES["convrot"])
    own = {name: tensor.bfloat16() for name, tensor in transformer.state_dict().items()}
    same = {
        "img_in.weight": "x_embedder.weight",
        "txt_in.bias": "context_embedder.bias",
        "vector_in.out_layer.weight": "time_text_embed.text_embedder.linear_2.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale": "transformer_blocks.0.attn.norm_k.weight",
        "single_blocks.0.norm.query_norm.scale": "single_transformer_blocks.0.attn.norm_q.weight",
        "final_layer.linear.bias": "proj_out.bias",
    }
    for native, name in same.items():
        assert torch.equal(file.tensors[native], own[name]), native
    scale, shift = own["norm_out.linear.weight"].chunk(2)
    assert torch.equal(
        file.tensors["final_layer.adaLN_modulation.1.weight"], torch.cat([shift, scale])
    )
    assert file.layers() == sorted([*NATIVE, *MODULATORS])
    assert file.metadata["format"] == "pt"


def test_records_name_what_the_reader_needs(exported):
    native = "single_blocks.0.linear2"
    file, _, _ = exported(*CASES["convrot"])
    assert file.record(native) == {"format": "convrot_w4a4", "convrot_groupsize": 64}
    file, _, _ = exported(*CASES["convrot-int8"])
    assert file.record(native)["linear_dtype"] == "int8"
    file, _, _ = exported(*CASES["rank 24"])
    assert file.record(native) == {"format": "svdquant_w4a4"}
    assert file.layer(native)["proj_down"].shape[1] == 32  # tiles of 16


@pytest.mark.parametrize(
    ("words", "format", "problem", "instead", "again"),
    [
        (INTEGERS, "convrot_w4a4", "low-rank branch of rank 16 taken out", "No other", CONVROT),
        (("method=absorb",), "convrot_w4a4", "beside the input", "svdquant_w4a4", CONVROT),
        (CONVROT, "svdquant_w4a4", "regular Hadamard", "convrot_w4a4", ("method=svdquant",)),
        (("method=convrot",), "convrot_w4a4", "per group of 64", "No other format", CONVROT),
        (("method=rtn",), "nvfp4", "int4 weights", "svdquant_w4a4", ("method=rtn_nvfp4",)),
    ],
)  # fmt: skip
def test_a_plan_that_a_format_cannot_hold(line, tmp_path, words, format, problem, instead, again):
    packed = run(line(*words, "until=pack"))["pack"]
    with pytest.raises(UnsupportedError) as refused:
        dirotq.export(packed.path, format, out=tmp_path / "x.safetensors")
    message = str(refused.value)
    assert problem in message and instead in message
    assert f"`{' '.join(again)}`" in message or f"dirotq compress {' '.join(again)}`" in message
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_is_advised_can_be_exported(line, tmp_path):
    packed = run(line(*FLOATS["gptq"][1], "until=pack"))["pack"]
    assert dirotq.export(packed.path, "nvfp4", out=tmp_path / "x.safetensors").layers["nvfp4"] == 10


@pytest.fixture
def convrot_folder(line, tmp_path):
    model = run(line(*CONVROT, "until=pack"))["pack"].tree("model")
    return shutil.copytree(model, tmp_path / "packed")


def test_a_file_that_exists(convrot_folder, tmp_path):
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    with pytest.raises(ConfigError, match=r"is there already.*--overwrite"):
        dirotq.export(convrot_folder, "convrot_w4a4", out=out)
    assert out.read_text() == "mine"
    dirotq.export(convrot_folder, "convrot_w4a4", out=out, overwrite=True)
    assert ExportedFile(out).layers()


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("there", "is a folder"),
        ("x.gguf", "doesn't end in .safetensors"),
        ("nowhere/x.safetensors", "no folder that can be written to"),
        ("packed/x.safetensors", "lies in the packed folder"),
        ("packed/transformer/x.safetensors", "lies in the packed folder"),
    ],
)
def test_places_that_are_refused(convrot_folder, tmp_path, place, problem):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match=problem):
        dirotq.export(convrot_folder, "convrot_w4a4", out=tmp_path / place)


def test_the_default_name(convrot_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = dirotq.export("packed", "convrot_w4a4")
    assert done.file.name == "packed-convrot_w4a4.safetensors" and done.file.is_file()


def test_an_unknown_format(convrot_folder):
    with pytest.raises(ConfigError, match=r"no format 'convrot'.*convrot_w4a4, svdquant_w4a4"):
        dirotq.export(convrot_folder, "convrot")


def test_a_folder_of_a_newer_version(convrot_folder, tmp_path):
    file = convrot_folder / "transformer" / "config.json"
    config = read_json(file)
    config["quantization_config"]["format"] = 99
    write_json(file, config)
    write_sums(convrot_folder)
    with pytest.raises(UnsupportedError, match=r"format 99.*Upgrade"):
        dirotq.export(convrot_folder, "convrot_w4a4", out=tmp_path / "x.safetensors")


def test_a_damaged_folder(convrot_folder, tmp_path):
    weights = convrot_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError):
        dirotq.export(convrot_folder, "convrot_w4a4", out=tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_a_folder_that_lacks_a_tensor(convrot_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = convrot_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors.pop("transformer_blocks.0.attn.norm_q.weight")
    save_file(tensors, weights)
    (convrot_folder / SUMS).unlink()
    with pytest.raises(ArtifactError, match=r"norm_q.weight is missing"):
        dirotq.export(convrot_folder, "convrot_w4a4", out=tmp_path / "x.safetensors", verify=False)


def test_numbers_are_checked_and_nothing_is_left(convrot_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = convrot_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["single_transformer_blocks.0.qkv_mlp.wscale"][3] = torch.nan
    save_file(tensors, weights)
    (convrot_folder / SUMS).unlink()
    with pytest.raises(ArtifactError, match="NaN"):
        dirotq.export(convrot_folder, "convrot_w4a4", out=tmp_path / "x.safetensors", verify=False)
    assert [file.name for file in tmp_path.iterdir()] == ["packed"]
