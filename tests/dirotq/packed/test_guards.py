"""diffusers' own habits on packed transformers (K6 of what people bring)."""

import copy
import gc
import io
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import tiny_offload
import torch
from diffusers import (
    FluxControlNetModel,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DControlNetModel,
    QwenImageControlNetModel,
    SD3ControlNetModel,
)
from tiny_line import CALL, CAPTIONS, tree_bytes
from tiny_offload import NETWORKS

import dirotq
from dirotq.errors import ArtifactError, ConfigError, UnsupportedError
from dirotq.packed.guards import guard
from dirotq.runtime.accelerate import runtime_of
from dirotq.runtime.graphs import GraphedForward


@pytest.fixture
def pipe(finished):
    return dirotq.load(finished["pack"].path, device="cpu")


def image(pipe, transformer=None) -> torch.Tensor:
    pipe = type(pipe)(**pipe.components | {"transformer": transformer or pipe.transformer})
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator("cpu").manual_seed(1)
    return pipe(CAPTIONS[0], generator=noise, output_type="pt", **CALL).images.float()


def by_pickle(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301


def by_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("way", "graphs"),
    [(by_pickle, True), (by_pickle, False), (by_torch, True), (copy.deepcopy, True)],
)
def test_a_packed_transformer_goes_through_pickle(pipe, finished, tmp_path, way, graphs):
    dirotq.accelerate(pipe, graphs=graphs)
    want = image(pipe)  # what a call leaves behind has to go along, too
    back = way(pipe.transformer)
    assert torch.equal(image(pipe, back), want)
    assert isinstance(vars(back).get("forward"), GraphedForward) == graphs
    assert runtime_of(back) == runtime_of(pipe.transformer)
    if graphs:
        assert back.forward.transformer is back
        assert back.forward.original.__self__ is back
    block = back.transformer_blocks[0]
    assert block.attn.to_q.site is block.attn.qkv
    assert block.forward.block is block
    assert back.to("cpu") is back
    back.save_pretrained(tmp_path)
    assert tree_bytes(tmp_path) == tree_bytes(finished["pack"].data / "model" / "transformer")
    dirotq.accelerate(back, graphs=not graphs, compile=False)
    assert runtime_of(back).graphs != graphs


@pytest.mark.parametrize("name", NETWORKS)
def test_every_family_goes_through_pickle(name):
    network = tiny_offload.network(name)
    dirotq.accelerate(network, graphs=True)
    guard(network)
    want = tiny_offload.call(network, name)
    assert torch.equal(tiny_offload.call(by_pickle(network), name), want)


def test_a_whole_pipeline_and_a_forward_go_through_pickle(pipe):
    assert torch.equal(image(by_pickle(pipe)), image(pipe))
    graphed = by_pickle(pipe.transformer.forward)
    assert graphed.transformer.forward is graphed
    assert graphed.original.__self__ is graphed.transformer


def _rows(transformer) -> list[float]:
    """In another process: which only gets what pickle brings there."""
    return transformer.single_transformer_blocks[0].proj_out.wscale.flatten()[:3].tolist()


def test_a_spawned_process_takes_one(pipe):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, gc.disable) as pool:
        assert pool.submit(_rows, pipe.transformer).result() == _rows(pipe.transformer)


def test_what_is_saved_as_pickles_is_packed_as_safetensors(pipe, tmp_path, caplog):
    pipe.save_pretrained(tmp_path, safe_serialization=False, variant="x")
    assert "saved as safetensors all the same" in caplog.text
    assert [p.name for p in (tmp_path / "transformer").glob("*model*")] == [
        "diffusion_pytorch_model.x.safetensors"
    ]
    assert (tmp_path / "vae" / "diffusion_pytorch_model.x.bin").is_file()
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer", variant="x")
    assert torch.equal(image(pipe, again), image(pipe))


def test_flashpack_is_refused(pipe, tmp_path):
    with pytest.raises(UnsupportedError, match=r"safetensors only.*use_flashpack=True"):
        pipe.transformer.save_pretrained(tmp_path, use_flashpack=True)


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_a_variant_is_found_by_itself(pipe, tmp_path, shard):
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size=shard)
    assert not (tmp_path / "transformer" / "diffusion_pytorch_model.safetensors").exists()
    assert torch.equal(image(dirotq.load(tmp_path, device="cpu")), image(pipe))
    assert torch.equal(image(dirotq.load(tmp_path, device="cpu", variant="fp16")), image(pipe))
    with pytest.raises(ArtifactError, match=r"variant='fp16', not of variant='ema'"):
        dirotq.load(tmp_path, device="cpu", variant="ema")
    pipe.save_pretrained(tmp_path, variant="b-2", max_shard_size=shard)
    with pytest.raises(ArtifactError, match=r"variant='b-2', variant='fp16', not of variant=None"):
        dirotq.load(tmp_path, device="cpu")
    dirotq.load(tmp_path, device="cpu", variant="b-2")
    pipe.save_pretrained(tmp_path, max_shard_size=shard)  # plain names come first
    dirotq.load(tmp_path, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pipe_shares_the_packed_transformer(finished, dtype):
    pipe = dirotq.load(finished["pack"].path, device="cpu", dtype=torch.bfloat16)
    codes = pipe.transformer.single_transformer_blocks[0].proj_out.qweight.clone()
    scales = pipe.transformer.single_transformer_blocks[0].proj_out.wscale.clone()
    other = FluxImg2ImgPipeline.from_pipe(pipe, dtype=dtype)
    assert other.transformer is pipe.transformer
    assert {p.dtype for p in pipe.components.values() if isinstance(p, torch.nn.Module)} == {dtype}
    assert pipe.transformer.x_embedder.weight.dtype == dtype
    site = pipe.transformer.single_transformer_blocks[0].proj_out
    assert torch.equal(site.qweight, codes)
    assert torch.equal(site.wscale, scales)
    assert image(pipe).isfinite().all()
    assert pipe.transformer.is_quantized


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_cast_and_save_keeps_what_the_dtype_holds(finished, tmp_path, dtype):
    model = finished["pack"].data / "model" / "transformer"
    pipe = dirotq.load(model.parent, device="cpu", dtype=torch.float16)
    pipe.to(dtype).transformer.save_pretrained(tmp_path)
    assert tree_bytes(tmp_path) == tree_bytes(model)


def test_only_a_pipeline_casts(pipe):
    """As diffusers has it for every quantized model; ``from_pipe`` is what it lets through."""
    for cast in (lambda t: t.to(torch.float16), lambda t: t.half(), lambda t: t.float()):
        with pytest.raises(ValueError, match="quantized model"):
            cast(pipe.transformer)
    pipe.to("cpu", torch.float16)
    assert pipe.transformer.dtype == torch.float16
    with pytest.raises(ValueError, match="quantized model"):
        pipe.transformer.to(torch.float32)


def test_the_parameters_of_the_16_bit_network_are_counted(pipe, folder):
    plain = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    for flags in ({}, {"exclude_embeddings": True}):
        assert pipe.transformer.num_parameters(**flags) == plain.num_parameters(**flags)
    trainable = sum(p.numel() for p in pipe.transformer.parameters() if p.requires_grad)
    assert pipe.transformer.num_parameters(only_trainable=True) == trainable
    assert pipe.transformer.get_memory_footprint() < plain.get_memory_footprint() / 2


@pytest.mark.parametrize(
    "controlnet",
    [FluxControlNetModel, SD3ControlNetModel, QwenImageControlNetModel,
     HunyuanDiT2DControlNetModel],
)  # fmt: skip
def test_no_controlnet_copies_a_packed_transformer(pipe, controlnet):
    config = dict(pipe.transformer.config)
    for call in (
        lambda t: controlnet.from_transformer(t),
        lambda t: controlnet.from_transformer(transformer=t, load_weights_from_transformer=False),
    ):
        with pytest.raises(UnsupportedError, match=rf"{controlnet.__name__}.*16-bit transformer"):
            call(pipe.transformer)
    assert dict(pipe.transformer.config) == config


def test_a_controlnet_of_16_bit_weights_is_made_as_ever(pipe, folder):
    plain = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    made = FluxControlNetModel.from_transformer(
        plain, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2
    )
    got, given = made.transformer_blocks[0].attn.to_q, plain.transformer_blocks[0].attn.to_q
    assert torch.equal(got.weight, given.weight)


@pytest.mark.parametrize("strict", [True, False])
def test_sixteen_bit_weights_are_not_mixed_in(pipe, folder, strict):
    plain = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    with pytest.raises(UnsupportedError, match=r"weight can't be loaded.*packed to 4 bits"):
        pipe.transformer.load_state_dict(plain.state_dict(), strict=strict)
    own = pipe.transformer.state_dict()
    assert not any(pipe.transformer.load_state_dict(own))


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (None, {"compile": False}, "NoneType has no transformer"),
        (object(), {"compile": False}, "object has no transformer"),
        (torch.nn.Linear(1, 1), {"compile": "no"}, "compile is 'no'; use True or False"),
        (torch.nn.Linear(1, 1), {"graphs": 1}, "graphs is 1"),
        (torch.nn.Linear(1, 1), {"attention": ["fp8"]}, "unknown"),
        (torch.nn.Linear(1, 1), {"speed": 2}, "no speed"),
    ],
)
def test_accelerate_says_what_it_takes(model, changes, message):
    with pytest.raises(ConfigError, match=message):
        dirotq.accelerate(model, **changes)


def test_qkv_are_fused_already(pipe):
    want = image(pipe)
    pipe.transformer.fuse_qkv_projections()
    assert torch.equal(image(pipe), want)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(image(pipe), want)
