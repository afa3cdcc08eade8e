"""Ways in which diffusers' users load, cast, place and reuse a pipeline, on a packed one."""

from typing import Any

import pytest
import torch
from diffusers import (
    AutoModel,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, attention_backend
from diffusers.quantizers import PipelineQuantizationConfig
from PIL import Image
from tiny_line import CALL, CAPTIONS

import dirotq  # noqa: F401
from dirotq.errors import UnsupportedError
from dirotq.kernels.linear import QuantLinear

PICTURE = Image.new("RGB", (32, 32), (200, 30, 30))
PARTS = dict.fromkeys(
    ("pos_embed", "time_text_embed", "context_embedder", "x_embedder", "norm_out", "proj_out"),
    "cpu",
) | {"transformer_blocks": "disk", "single_transformer_blocks": "cpu"}
"""Places that overlap ("" beside a part) accelerate refuses, of 16 bits too."""


def draw(pipe: Any, **more: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(1)
    call = CALL | {"prompt": CAPTIONS[0], "generator": seed, "output_type": "pt"} | more
    return pipe(**call).images.float()


@pytest.fixture
def packed(finished):
    return finished["pack"].data / "model"


@pytest.fixture
def pipe(packed):
    return DiffusionPipeline.from_pretrained(packed)


@pytest.fixture(scope="module")
def want(finished):
    return draw(DiffusionPipeline.from_pretrained(finished["pack"].data / "model"))


def linears(pipe: Any) -> list[QuantLinear]:
    return [m for m in pipe.transformer.modules() if isinstance(m, QuantLinear)]


@pytest.mark.parametrize("word", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dtype_is_that_of_the_16_bit_parts(packed, word, dtype):
    pipe = DiffusionPipeline.from_pretrained(packed, **{word: dtype})
    assert pipe.transformer.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == dtype
    assert {linear.wscale.dtype for linear in linears(pipe)} == {torch.bfloat16}
    assert pipe.transformer.config._pre_quantization_dtype == dtype


def test_the_default_dtype_is_noted_too(pipe):
    assert pipe.transformer.dtype == torch.float32
    assert pipe.transformer.config._pre_quantization_dtype == torch.float32


def test_a_dtype_for_each_component(packed):
    dtypes = {"transformer": torch.bfloat16, "default": torch.float16}
    pipe = DiffusionPipeline.from_pretrained(packed, torch_dtype=dtypes)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("place", ["balanced", "cpu"])
def test_a_device_map_of_the_pipeline(packed, want, place):
    assert torch.equal(draw(DiffusionPipeline.from_pretrained(packed, device_map=place)), want)


@pytest.mark.parametrize(
    "device_map",
    ["auto", {"": "cpu"}, {"": "disk"}, PARTS],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_device_map_of_the_transformer(packed, want, device_map, tmp_path):
    made = FluxTransformer2DModel.from_pretrained(
        packed, subfolder="transformer", device_map=device_map, offload_folder=tmp_path
    )
    assert made.hf_device_map
    assert torch.equal(draw(FluxPipeline.from_pretrained(packed, transformer=made)), want)


def test_classes_that_find_the_class(packed, pipe, want):
    made = AutoModel.from_pretrained(str(packed), subfolder="transformer")
    assert torch.equal(draw(FluxPipeline.from_pretrained(packed, transformer=made)), want)
    assert torch.equal(draw(AutoPipelineForText2Image.from_pretrained(packed)), want)
    for auto in (AutoPipelineForImage2Image, AutoPipelineForInpainting):
        assert auto.from_pipe(pipe).transformer is pipe.transformer


@pytest.mark.parametrize(
    ("cls", "given"),
    [
        (FluxImg2ImgPipeline, {"image": PICTURE, "strength": 0.9}),
        (FluxInpaintPipeline, {"image": PICTURE, "mask_image": PICTURE, "strength": 0.9}),
        (FluxKontextPipeline, {"image": PICTURE, "max_area": 1024, "_auto_resize": False}),
    ],
)
def test_other_pipelines_around_the_same_transformer(pipe, want, cls, given):
    other = cls.from_pipe(pipe)
    assert other.transformer is pipe.transformer
    drawn = draw(other, **given)
    assert drawn.shape == want.shape and drawn.isfinite().all()
    assert torch.equal(draw(cls(**other.components), **given), drawn)
    assert torch.equal(draw(pipe), want)


def test_a_controlnet_beside_it(pipe, want):
    config = pipe.transformer.config
    names = (
        "patch_size", "in_channels", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "pooled_projection_dim", "axes_dims_rope", "guidance_embeds",
    )  # fmt: skip
    torch.manual_seed(0)
    net = FluxControlNetModel(num_layers=1, num_single_layers=1, **{n: config[n] for n in names})
    torch.nn.init.normal_(net.controlnet_blocks[0].weight)
    other = FluxControlNetPipeline.from_pipe(pipe, controlnet=net)
    drawn = draw(other, control_image=PICTURE)
    assert drawn.isfinite().all() and not torch.equal(drawn, want)
    assert torch.equal(draw(pipe), want)


def test_a_configuration_for_the_pipeline(packed, pipe, want, folder):
    """Given with the folder that it describes, it is that; packing itself takes calibration."""
    config = pipe.transformer.config.quantization_config
    given = PipelineQuantizationConfig(quant_mapping={"transformer": config})
    assert torch.equal(
        draw(DiffusionPipeline.from_pretrained(packed, quantization_config=given)), want
    )
    message = r"packing takes calibration, `dirotq compress model=FOLDER`"
    with pytest.raises(UnsupportedError, match=message):
        DiffusionPipeline.from_pretrained(folder, quantization_config=given)
    with pytest.raises(UnsupportedError, match=message):
        FluxTransformer2DModel.from_pretrained(
            folder, subfolder="transformer", quantization_config=config
        )


def test_an_attention_backend(pipe, want, monkeypatch):
    default = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", default)
    asked = []
    for name in ("native", "_native_math"):
        entry = next(b for b in _AttentionBackendRegistry._backends if b.value == name)
        chosen = _AttentionBackendRegistry._backends[entry]
        monkeypatch.setitem(
            _AttentionBackendRegistry._backends,
            entry,
            lambda *args, chosen=chosen, name=name, **kwargs: (
                asked.append(name) or chosen(*args, **kwargs)
            ),
        )
    with attention_backend("_native_math"):
        close = draw(pipe)
    assert set(asked) == {"_native_math"} and torch.allclose(close, want, atol=1e-4)
    asked.clear()
    assert torch.equal(draw(pipe), want) and set(asked) == {"native"}
    asked.clear()
    pipe.transformer.set_attention_backend("_native_math")
    assert torch.allclose(draw(pipe), want, atol=1e-4) and set(asked) == {"_native_math"}


def test_layerwise_casting_casts_what_is_in_16_bits(packed):
    pipe = DiffusionPipeline.from_pretrained(packed, dtype=torch.bfloat16)
    before = [{n: t.dtype for n, t in linear.named_parameters()} for linear in linears(pipe)]
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    assert pipe.transformer.context_embedder.weight.dtype == torch.float8_e4m3fn
    assert draw(pipe).isfinite().all()
    after = [{n: t.dtype for n, t in linear.named_parameters()} for linear in linears(pipe)]
    assert after == before
