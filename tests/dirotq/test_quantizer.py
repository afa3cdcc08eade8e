import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_line import run, tree_bytes
from tiny_packed import packed
from tiny_spec import FP4, tiny_spec
from torch import Tensor

import dirotq
from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.files.sums import SUMS, write_sums
from dirotq.kernels.formats.lm4 import CODES as LM4_CODES
from dirotq.kernels.formats.lm4 import LEVELS
from dirotq.kernels.formats.quantize_weight import scale_floor, unpack_codes
from dirotq.kernels.linear import QuantLinear, SiteView
from dirotq.packed.config import FORMAT
from dirotq.quantize.plan import read_plan
from dirotq.quantizer import FLOOR_GRACE, DirotqConfig, check_numbers

SITE = "single_transformer_blocks.0.qkv_mlp"
CODES, SCALES = f"{SITE}.qweight", f"{SITE}.wscale"


def weights(folder: Path) -> Path:
    (file,) = (folder / "transformer").glob("*.safetensors")
    return file


def rewrite(folder: Path, change) -> None:
    """Apply ``change`` to the tensors of a packed folder."""
    tensors: dict[str, Tensor] = load_file(weights(folder))
    change(tensors)
    save_file(tensors, weights(folder), metadata={"format": "pt"})
    write_sums(folder)  # what is tried here is what lies behind the digests


def edit_packing(folder: Path, **changes) -> None:
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))
    write_sums(folder)


def test_config_round_trip(finished):
    plan = read_plan(finished["rank"].file("plan.json"))
    entries = [(entry.site, entry.spec) for entry in plan]
    stored = json.loads(json.dumps(DirotqConfig.of(entries).to_dict()))
    assert stored["quant_method"] == "dirotq"
    assert stored["format"] == 3  # the first readers don't know levels
    assert DirotqConfig(**stored).entries() == entries


def test_the_folder_carries_rank_and_format_of_every_site(finished):
    config = json.loads(finished["pack"].file("model/transformer/config.json").read_text())
    plan = read_plan(finished["rank"].file("plan.json"))
    assert DirotqConfig(**config["quantization_config"]).entries() == [
        (entry.site, entry.spec) for entry in plan
    ]


def test_the_transformer_loads_alone(finished):
    model = FluxTransformer2DModel.from_pretrained(
        finished["pack"].tree("model"), subfolder="transformer"
    )
    site = model.single_transformer_blocks[0].qkv_mlp
    assert isinstance(site, QuantLinear)
    assert isinstance(model.single_transformer_blocks[0].attn.to_q, SiteView)
    assert torch.equal(site.qweight, load_file(weights(finished["pack"].tree("model")))[CODES])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_buffers_are_never_cast(finished, dtype):
    folder = finished["pack"].tree("model")
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=dtype)
    stored = load_file(weights(folder))
    for name, tensor in model.state_dict().items():
        packed = isinstance(model.get_submodule(name.rpartition(".")[0]), QuantLinear)
        assert tensor.dtype == (stored[name].dtype if packed else dtype), name
        if packed:
            assert torch.equal(tensor, stored[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(CODES), f"{CODES} is missing"),
        (lambda t: t.pop("x_embedder.bias"), "x_embedder.bias is missing"),
        (lambda t: t.update({"foreign": torch.zeros(1)}), "foreign belongs to no layer"),
        (
            lambda t: t.update({CODES: t[CODES][:, :-1].contiguous()}),
            rf"{CODES} is U8 \[448, 31\], expected U8 \[448, 32\]",
        ),
        (
            lambda t: t.update({"proj_out.weight": t["proj_out.weight"].T.contiguous()}),
            r"proj_out\.weight is BF16 \[64, 16\], expected BF16 \[16, 64\]",
        ),
        (
            lambda t: t.update({SCALES: t[SCALES].float()}),
            rf"{SCALES} is F32 \[448, 1\], expected BF16 \[448, 1\]",
        ),
    ],
    ids=["packed-missing", "plain-missing", "extra", "packed-shape", "plain-shape", "dtype"],
)
def test_tensors_that_do_not_fit_are_named(packed_folder, change, message):
    rewrite(packed_folder, change)
    with pytest.raises(ArtifactError, match=message):
        dirotq.load(packed_folder)


def test_many_problems_are_counted(packed_folder):
    rewrite(packed_folder, dict.clear)
    with pytest.raises(ArtifactError, match=r"is missing.*\(and \d\d more\)"):
        dirotq.load(packed_folder)


def test_a_rank_that_the_tensors_do_not_have(packed_folder):
    config = json.loads((packed_folder / "transformer" / "config.json").read_text())
    sites = config["quantization_config"]["sites"]
    next(s for s in sites if s["spec"]["rank"])["spec"]["rank"] = 8
    edit_packing(packed_folder, sites=sites)
    with pytest.raises(ArtifactError, match=r"basis is BF16 \[64, 16\], expected BF16 \[64, 8\]"):
        dirotq.load(packed_folder)


def test_a_newer_format_is_refused(packed_folder):
    edit_packing(packed_folder, format=FORMAT + 1)
    with pytest.raises(UnsupportedError, match=rf"format {FORMAT + 1}; .* up to {FORMAT}.*Upgrade"):
        dirotq.load(packed_folder)


def load_alone(folder: Path) -> FluxTransformer2DModel:
    """By diffusers itself, which knows of us only that ``dirotq`` was imported."""
    return FluxTransformer2DModel.from_pretrained(folder / "transformer")


@pytest.mark.parametrize("load", [dirotq.load, load_alone])
@pytest.mark.parametrize(
    ("buffer", "value", "message"),
    [
        ("wscale", float("nan"), "wscale holds NaN or infinity: the file is damaged"),
        ("basis", float("inf"), "basis holds NaN or infinity"),
        ("wp", float("nan"), "wp holds NaN or infinity"),
        ("bias", -float("inf"), "bias holds NaN or infinity"),
        ("wscale", -0.5, r"wscale holds -0\.5, but scales are zero or more"),
        (
            "wscale",
            2**-30,
            r"wscale is 9.31e-10 in row 0, too small .* which need .*dirotq compress",
        ),
        ("bias", 1e6, r"wscale is .* in row 0, too small .* which need 488"),
    ],
)
def test_damaged_numbers_are_named(packed_folder, load, buffer, value, message):
    rewrite(packed_folder, lambda t: t[f"{SITE}.{buffer}"].view(-1)[:1].fill_(value))
    with pytest.raises(ArtifactError, match=rf"^{SITE}\.{message}"):
        load(packed_folder)


def test_a_modulators_group_scales_have_no_floor(packed_folder):
    name = "single_transformer_blocks.0.norm.linear"
    rewrite(packed_folder, lambda t: t[f"{name}.bias"].fill_(1e6))
    load_alone(packed_folder)


@pytest.mark.parametrize("buffer", ["wscale", "basis", "rotation", "wp", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_floating_buffer_is_looked_at(buffer, value):
    module = packed(tiny_spec(rank=8, transform="dense"))
    module.wscale.clamp_min_(scale_floor(module.wp, module.bias))
    check_numbers("linear", module)
    getattr(module, buffer)[-1] = value
    with pytest.raises(ArtifactError, match=rf"^linear\.{buffer} holds NaN or infinity"):
        check_numbers("linear", module)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
def test_a_scale_may_lie_on_its_floor_but_not_below(rank, bias):
    module = packed(tiny_spec(rank=rank), bias=bias)
    floor = scale_floor(module.wp, module.bias)
    if floor is None:
        module.wscale.zero_()
        check_numbers("linear", module)
        return
    module.wscale.copy_(floor)
    check_numbers("linear", module)
    module.wscale[7] = floor[7] * (1 - 2 * FLOOR_GRACE)
    with pytest.raises(ArtifactError, match=r"wscale is .* in row 7, too small"):
        check_numbers("linear", module)


def test_a_zero_scale_needs_zero_wp_and_bias():
    module = packed(tiny_spec(rank=8))
    module.wscale.clamp_min_(scale_floor(module.wp, module.bias))
    module.wscale[5], module.wp[5] = 0.0, 0.0
    with pytest.raises(ArtifactError, match="in row 5"):
        check_numbers("linear", module)
    module.bias[5] = 0.0
    check_numbers("linear", module)


def test_offloaded_tensors_are_passed_over():
    module = packed(tiny_spec(rank=8)).to("meta")
    check_numbers("linear", module)


def test_a_truncated_shard_is_named(packed_folder):
    model = load_alone(packed_folder)
    weights(packed_folder).unlink()
    (packed_folder / SUMS).unlink()
    model.save_pretrained(packed_folder / "transformer", max_shard_size="100KB")
    load_alone(packed_folder)
    shard = sorted((packed_folder / "transformer").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=rf"{shard.name} is damaged or was not written to its"):
        load_alone(packed_folder)


def test_a_folder_of_levels_is_read_by_who_knows_them(line, tmp_path, monkeypatch):
    artifacts = run(line("method=levels", "until=pack"))
    levels_folder = Path(shutil.copytree(artifacts["pack"].tree("model"), tmp_path / "levels"))
    packing = json.loads((levels_folder / "transformer" / "config.json").read_text())
    assert packing["quantization_config"]["format"] == 3 == FORMAT
    assert packing["quantization_config"]["levels"] == list(LEVELS)
    card = (levels_folder / "README.md").read_text()
    assert "| W4A4 LM4 | weights: lm4_channel, activations: rms" in card
    assert "| W4A16 LM4 | weights: lm4_group of " in card
    model = load_alone(levels_folder)
    site = model.get_submodule(SITE)
    codes = unpack_codes(site.qweight, "lm4").unique().tolist()
    assert codes == sorted([*LM4_CODES, *(-code for code in LM4_CODES)])
    model.save_pretrained(tmp_path / "again")
    assert tree_bytes(tmp_path / "again") == tree_bytes(levels_folder / "transformer")
    edit_packing(levels_folder, levels=[*LEVELS[:-1], 7.0])
    with pytest.raises(ArtifactError, match=r"levels is .*7\.0\]; LM4's are"):
        load_alone(levels_folder)
    monkeypatch.setattr("dirotq.packed.config.FORMAT", 2)
    with pytest.raises(UnsupportedError, match=r"packed in format 3; .* up to 2\. Upgrade: pip"):
        dirotq.load(levels_folder)


@pytest.fixture(params=["nvfp4", "mxfp4"])
def fp4_folder(request, line, tmp_path) -> Path:
    artifacts = run(line(f"method=dirotq_{request.param}", "until=pack"))
    return Path(shutil.copytree(artifacts["pack"].tree("model"), tmp_path / request.param))


def test_fp4_folders_say_so_to_readers_that_do_not_know_it(fp4_folder, monkeypatch):
    config = json.loads((fp4_folder / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["format"] == 2
    monkeypatch.setattr("dirotq.packed.config.FORMAT", 1)
    with pytest.raises(UnsupportedError, match=r"packed in format 2; .* up to 1\. Upgrade: pip"):
        dirotq.load(fp4_folder)


def test_fp4_buffers_keep_their_bytes(fp4_folder, tmp_path):
    stored = load_file(weights(fp4_folder))
    nvfp4 = fp4_folder.name == "nvfp4"
    assert stored[SCALES].dtype == torch.uint8
    assert (f"{SITE}.wglobal" in stored) == nvfp4
    pipe = dirotq.load(fp4_folder, device="cpu", dtype=torch.bfloat16)
    site = pipe.transformer.single_transformer_blocks[0].qkv_mlp
    if nvfp4:
        assert site.wglobal.dtype == stored[f"{SITE}.wglobal"].dtype == torch.float32
        assert torch.equal(site.wglobal, stored[f"{SITE}.wglobal"])
    for shard in ("5GB", "100KB"):
        pipe.transformer.save_pretrained(tmp_path / shard, max_shard_size=shard)
    assert tree_bytes(tmp_path / "5GB") == tree_bytes(fp4_folder / "transformer")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "100KB")
    assert {n: t.dtype for n, t in again.state_dict().items() if n.startswith(SITE)} == {
        n: t.dtype for n, t in stored.items() if n.startswith(SITE)
    }


@pytest.mark.parametrize(
    ("fp4_folder", "buffer", "value", "message"),
    [
        ("nvfp4", "wscale", 127, r"wscale holds the byte 127, NaN or .* nvfp4, which are 0 .* 126"),
        ("nvfp4", "wscale", 128 + 56, r"wscale holds the byte 184, NaN or a negative number"),
        (
            "mxfp4",
            "wscale",
            255,
            r"wscale holds the byte 255, NaN .* mxfp4, which are 0 \.\.\. 254",
        ),
        ("nvfp4", "wglobal", 0.0, r"wglobal is 0, but a global scale is above zero"),
        ("nvfp4", "wglobal", -1e-3, r"wglobal is -0\.001, but a global scale is above zero"),
        ("nvfp4", "wglobal", float("nan"), "wglobal holds NaN or infinity"),
        ("mxfp4", "basis", float("inf"), "basis holds NaN or infinity"),
    ],
    indirect=["fp4_folder"],
)
def test_damaged_fp4_numbers_are_named(fp4_folder, buffer, value, message):
    rewrite(fp4_folder, lambda t: t[f"{SITE}.{buffer}"].view(-1)[-1:].fill_(value))
    with pytest.raises(ArtifactError, match=rf"^{SITE}\.{message}"):
        load_alone(fp4_folder)


@pytest.mark.parametrize(
    ("fp4_folder", "change", "message"),
    [
        ("nvfp4", lambda t: t.pop(f"{SITE}.wglobal"), r"wglobal is missing"),
        ("mxfp4", lambda t: t.update({f"{SITE}.wglobal": torch.ones(1)}), "belongs to no layer"),
        (
            "nvfp4",
            lambda t: t.update({f"{SITE}.wglobal": torch.ones(1).bfloat16()}),
            r"wglobal is BF16 \[1\], expected F32 \[1\]",
        ),
        (
            "nvfp4",
            lambda t: t.update({SCALES: t[SCALES].bfloat16()}),
            r"wscale is BF16 \[448, 4\], expected U8 \[448, 4\]",
        ),
    ],
    indirect=["fp4_folder"],
)
def test_fp4_tensors_that_do_not_fit_are_named(fp4_folder, change, message):
    rewrite(fp4_folder, change)
    with pytest.raises(ArtifactError, match=message):
        load_alone(fp4_folder)


@pytest.mark.parametrize("name", FP4)
def test_fp4_scales_have_no_floor_and_may_lie_elsewhere(name):
    module = packed(tiny_spec(**FP4[name], rank=8))
    module.bias.fill_(1e6)
    module.wscale.zero_()
    check_numbers("linear", module)
    check_numbers("linear", module.to("meta"))
