"""What diffusers' mixins ask of a test class, by tiny pipelines, unpacked and packed."""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from nearest import flux_transformers, save
from tests.models.testing_utils import BaseModelTesterConfig
from tests.pipelines.testing_utils import BasePipelineTesterConfig
from tests.testing_utils import torch_device
from tiny_line import POOLED, TEXT, model_folder
from tiny_pipelines import PIPELINES

import dirotq  # noqa: F401  (diffusers reads packed folders from here on)

ROOT = Path(tempfile.mkdtemp(prefix="dirotq-mixins-"))


class Plain(FluxTransformer2DModel):
    """``Plain(**config)`` is the tiny transformer in 16 bits, in float32."""

    packed = False
    from_pretrained = FluxTransformer2DModel.from_pretrained

    def __new__(cls, **config: Any) -> Any:
        return FluxTransformer2DModel.from_pretrained(flux_transformers(ROOT)[cls.packed])


class Packed(Plain):
    """The same, packed: where a test makes a model, it gets a loaded one."""

    packed = True


class FluxPipelineConfig(BasePipelineTesterConfig):
    """``packed`` chooses between the two."""

    packed: ClassVar[bool]
    pipeline_class = FluxPipeline
    required_input_params_in_call_signature = frozenset(
        ["prompt", "height", "width", "guidance_scale", "prompt_embeds", "pooled_prompt_embeds"]
    )
    batch_input_params = frozenset(["prompt"])
    output_shape = (3, 16, 16)
    # FLUX.1 is distilled: its pipeline has no second batch.
    FASTER_CACHE_CONFIG: ClassVar = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (-1, 901),
        "unconditional_batch_skip_range": 2,
        "attention_weight_callback": lambda _: 0.5,
        "is_guidance_distilled": True,
    }

    def get_dummy_components(self, num_layers: int = 1, num_single_layers: int = 1) -> Any:
        folders = flux_transformers(
            ROOT, num_layers=num_layers, num_single_layers=num_single_layers
        )
        transformer = FluxTransformer2DModel.from_pretrained(folders[self.packed])
        pipe = FluxPipeline.from_pretrained(model_folder(ROOT), transformer=transformer)
        return pipe.to(torch.float32).components

    def get_dummy_inputs(self) -> dict[str, Any]:
        return {
            "prompt": "a large red circle at the top left",
            "generator": self.get_generator(0),
            "num_inference_steps": 2,
            "guidance_scale": 5.0,
            "height": 16,
            "width": 16,
            "max_sequence_length": 8,
            "output_type": "pt",
        }


class TinyPipelineConfig(BasePipelineTesterConfig):
    """``family`` names a tiny pipeline of tests/support/tiny_pipelines.py."""

    packed: ClassVar[bool]
    family: ClassVar[str]
    required_input_params_in_call_signature = frozenset(["prompt", "height", "width"])
    batch_input_params = frozenset(["prompt"])

    @property
    def pipeline_class(self) -> Any:
        return type(_tiny(self.family)[0])

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return 3, PIPELINES[self.family].call["height"], PIPELINES[self.family].call["width"]

    def get_dummy_components(self) -> Any:
        pipe, folders = _tiny(self.family)
        again = type(pipe.transformer).from_pretrained(folders[self.packed])
        return copy.deepcopy({k: v for k, v in pipe.components.items() if k != "transformer"}) | {
            "transformer": again
        }

    def get_dummy_inputs(self) -> dict[str, Any]:
        given = {"prompt": "a large red circle", "generator": self.get_generator(0)}
        return given | PIPELINES[self.family].call | {"output_type": "pt"}


@functools.cache
def _tiny(family: str) -> tuple[Any, tuple[Path, Path]]:
    torch.manual_seed(0)
    pipe = PIPELINES[family].build()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe, save(ROOT / family, copy.deepcopy(pipe.transformer))


class FluxModelConfig(BaseModelTesterConfig):
    """``packed`` chooses between the two."""

    packed: ClassVar[bool] = True
    output_shape = (16, 16)
    input_shape = (16, 16)
    main_input_name = "hidden_states"
    FASTER_CACHE_CONFIG: ClassVar = FluxPipelineConfig.FASTER_CACHE_CONFIG | {
        "tensor_format": "BCHW"
    }

    @property
    def model_class(self) -> Any:
        return Packed if self.packed else Plain

    def get_init_dict(self) -> dict[str, Any]:
        return {}

    def get_dummy_inputs(self, batch_size: int = 1) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(batch_size, 16, 16, generator=draw),
            "encoder_hidden_states": torch.randn(batch_size, 8, TEXT, generator=draw),
            "pooled_projections": torch.randn(batch_size, POOLED, generator=draw),
            "timestep": torch.tensor([1.0]).expand(batch_size),
            "img_ids": torch.randint(0, 16, (16, 3), generator=draw).float(),
            "txt_ids": torch.zeros(8, 3),
        }
        return {name: tensor.to(torch_device) for name, tensor in inputs.items()}
