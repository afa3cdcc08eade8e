import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import dirotq
from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.kernels.linear import QuantLinear, SiteView
from dirotq.plan import read_plan
from dirotq.quantizer import FORMAT, DirotqConfig

CODES = "single_transformer_blocks.0.qkv_mlp.qweight"
SCALES = CODES.replace("qweight", "wscale")


def weights(folder: Path) -> Path:
    (file,) = (folder / "transformer").glob("*.safetensors")
    return file


def rewrite(folder: Path, change) -> None:
    """Apply ``change`` to the tensors of a packed folder."""
    tensors: dict[str, Tensor] = load_file(weights(folder))
    change(tensors)
    save_file(tensors, weights(folder), metadata={"format": "pt"})


def edit_packing(folder: Path, **changes) -> None:
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))


def test_config_round_trip(finished):
    plan = read_plan(finished["rank"].file("plan.json"))
    entries = [(entry.site, entry.spec) for entry in plan]
    stored = json.loads(json.dumps(DirotqConfig.of(entries).to_dict()))
    assert stored["quant_method"] == "dirotq"
    assert stored["format"] == FORMAT
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
