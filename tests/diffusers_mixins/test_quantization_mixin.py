"""Quantization, of a transformer that is packed already: the tests of diffusers' shared mixin."""

from typing import Any

from diffusers import FluxTransformer2DModel
from nearest import flux_transformers
from tests.models.testing_utils.quantization import QuantizationTesterMixin
from tiny import ROOT, FluxModelConfig

from dirotq.kernels.linear import QuantLinear, SiteView


class TestQuantization(FluxModelConfig, QuantizationTesterMixin):
    model_class = FluxTransformer2DModel
    pretrained_model_name_or_path = str(flux_transformers(ROOT)[0])
    sharded_serialization_config: Any = {}  # noqa: RUF012

    def _create_quantized_model(self, config_kwargs: Any, **more: Any) -> Any:
        return FluxTransformer2DModel.from_pretrained(flux_transformers(ROOT)[1], **more)

    def _verify_if_layer_quantized(self, name: str, module: Any, config_kwargs: Any) -> None:
        assert isinstance(module, QuantLinear | SiteView), name

    def _is_module_quantized(self, module: Any, config_kwargs: Any = None) -> bool:
        return isinstance(module, QuantLinear | SiteView)

    def _test_quantized_layers(self, config_kwargs: Any) -> None:
        """As diffusers' own mixin of a backend of packed checkpoints (Nunchaku Lite) has it: what
        the configuration lists is packed."""
        model = self._create_quantized_model(config_kwargs)
        sites = model.config["quantization_config"].entries()
        listed = {name for site, _ in sites for name in site.linears}
        assert listed
        for name in listed:
            self._verify_if_layer_quantized(name, model.get_submodule(name), config_kwargs)

    def test_num_parameters(self):
        self._test_quantization_num_parameters({})

    def test_memory_footprint(self):
        self._test_quantization_memory_footprint({})

    def test_inference(self):
        self._test_quantization_inference({})

    def test_dtype_assignment(self):
        self._test_quantization_dtype_assignment({})

    def test_lora_inference(self):
        self._test_quantization_lora_inference({})

    def test_serialization(self, tmp_path):
        self._test_quantization_serialization({}, tmp_path)

    def test_config_serialization(self):
        self._test_quantization_config_serialization({})

    def test_original_dtype(self):
        self._test_original_dtype({})

    def test_quantized_layers(self):
        self._test_quantized_layers({})

    def test_keep_modules_in_fp32(self):
        self._test_keep_modules_in_fp32({})

    def test_device_map(self):
        self._test_quantization_device_map({})

    def test_cpu_device_map(self):
        self._test_quantization_cpu_device_map({})

    def test_dequantize(self):
        self._test_dequantize({})

    def test_training(self):
        self._test_quantization_training({})
