"""The transformers side of a packed text encoder: its ``quantization_config`` and its quantizer.

transformers finds both by the method's name once dirotq/_registration.py has seen it imported, in
``from_pretrained`` of 16-bit weights (which rounds them while they are read, one at a time) and of
packed ones. Weights alone are rounded: what a text encoder computes, it computes in 16 bits.
"""

from collections.abc import Iterable, Mapping
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dirotq.errors import ArtifactError, NumericalError, UnsupportedError
from dirotq.kernels.formats.weight import Element
from dirotq.kernels.weight_only import Bits, WeightOnlyLinear, rounded, takes

METHOD = "dirotq"
FORMAT = 2
"""Newest format of packed text encoders."""
ELEMENTS: dict[int, Element] = {1: "int4", 2: "lm4"}
"""What a 4-bit code is, by format. 8-bit codes are the same in both, and are written as the first,
which every DiRotQ reads."""
AGAIN = "download the model again, or pack it again with `dirotq compress`"


class Codes(dict[str, tuple[Tensor, Tensor]]):
    """``weight`` and ``scale`` of packed linears, by their paths; transformers copies configs, and
    copies none of them."""

    def __deepcopy__(self, memo: Any) -> "Codes":
        return self


@register_quantization_config(METHOD)
class TextEncoderConfig(QuantizationConfigMixin):
    """How a text encoder's weights are rounded.

    bits     4 (a scale per 64 columns; per 32 in format 1) or 8 (a scale per row)
    linears  paths of the packed ones; None, for 16-bit weights: those in repeated blocks
    format   of the files; None: the one that is written
    codes    of linears that are rounded already, in place of what is read; no file holds them

    Raises UnsupportedError for a newer format, ArtifactError for anything else that this version
    would not have written.
    """

    def __init__(
        self,
        bits: Any = None,
        linears: Any = None,
        format: Any = None,
        codes: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        **_: Any,
    ) -> None:
        if format is None:
            format = 1 if bits == 8 else FORMAT
        if type(format) is int and format > FORMAT:
            raise UnsupportedError(
                f"this text encoder is packed in format {format}; this DiRotQ reads up to "
                f"{FORMAT}. Upgrade: pip install -U dirotq"
            )
        known = linears is None or (
            isinstance(linears, list) and all(isinstance(name, str) for name in linears)
        )
        if type(format) is not int or format < 1 or bits not in get_args(Bits) or not known:
            raise ArtifactError(
                f"the quantization_config of this text encoder is damaged: format {format!r:.20}, "
                f"bits {bits!r:.20}, linears {linears!r:.60}, not a number from 1 to {FORMAT}, 4 "
                f"or 8, a list of paths; {AGAIN}"
            )
        self.quant_method = METHOD
        self.bits: Bits = bits
        self.linears: list[str] | None = linears
        self.format: int = format
        self.codes = Codes(codes or {})

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "format": self.format,
            "bits": self.bits,
            "linears": self.linears,
        }

    to_diff_dict = to_dict


@register_quantizer(METHOD)
class TextEncoderQuantizer(HfQuantizer):
    """Puts weight-only linears in the places of 16-bit ones; strict about every tensor."""

    requires_calibration = False
    quantization_config: TextEncoderConfig
    is_trainable = False
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.linears is None:
            config.linears = packable(model, config.bits)
        modules = dict(model.named_modules())
        for name in config.linears:
            linear = modules.get(name)
            if linear is None or not takes(linear, config.bits):
                raise ArtifactError(
                    f"{name:.80} is packed by the config.json of this {type(model).__name__}, and "
                    f"is no linear of it that takes {config.bits} bits; {AGAIN}"
                )
            packed = WeightOnlyLinear(linear, config.bits, ELEMENTS[config.format])
            packed.widens = name.rpartition(".")[2] in (model._keep_in_fp32_modules or ())
            model.set_submodule(name, packed)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        linear = isinstance(model.get_submodule(path), WeightOnlyLinear)
        return not self.pre_quantized and linear and name == "weight"

    def get_quantize_ops(self) -> "_Round":
        return _Round(self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, WeightOnlyLinear):
                _check_numbers(name, module)
        self.pre_quantized = True
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Back to the stored dtype, as packed transformers are saved; what is tied stays tied."""
        made: dict[tuple[int, torch.Size], Tensor] = {}
        state = {}
        for name, tensor in model.state_dict().items():
            same = (tensor.data_ptr(), tensor.shape)
            if tensor.is_floating_point():
                tensor = made.setdefault(same, tensor.to(torch.bfloat16))
            state[name] = tensor
        return state, {}


class _Round(ConversionOps):
    """Rounds one weight as it is read, unless it has codes."""

    def __init__(self, config: TextEncoderConfig) -> None:
        self.bits, self.codes = config.bits, config.codes

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Tensor]:
        (found,) = input_dict.values()
        weight = found[0] if isinstance(found, list) else found
        path = full_layer_name.rpartition(".")[0]
        if not weight.is_meta and not bool(weight.isfinite().all()):
            raise NumericalError(
                f"{path}: the weights hold NaN or infinity; the checkpoint is damaged"
            )
        codes, scale = self.codes.get(path) or rounded(weight, self.bits)
        return {f"{path}.weight": codes, f"{path}.scale": scale}


def packable(model: Any, bits: Bits) -> list[str]:
    """Return the paths of the linears in a text encoder's repeated blocks, in network order.

    Embeddings, norms, what stands before and behind the blocks (``lm_head``, projections) and
    weights that are shared with another module stay in 16 bits.
    """
    tied = {name.removesuffix(".weight") for name in _flat(model.all_tied_weights_keys)}
    blocks = [f"{n}." for n, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [
        name
        for name, module in model.named_modules()
        if takes(module, bits) and name.startswith(tuple(blocks)) and name not in tied
    ]


def _flat(tied: dict[str, Any]) -> Iterable[str]:
    for name, other in tied.items():
        yield name
        yield from [other] if isinstance(other, str) else other


def _check_numbers(name: str, packed: WeightOnlyLinear) -> None:
    """Raise ArtifactError for codes that are none, or scales that are negative or not finite.

    Tensors that were offloaded while loading are on the meta device and are passed over.
    """
    weight, scale = packed.weight, packed.scale
    if weight.dtype != torch.int8:
        raise ArtifactError(f"{name}.weight is stored as {weight.dtype}, codes are int8; {AGAIN}")
    if scale.is_meta or not scale.numel():
        return
    low, high = scale.aminmax()
    if not bool(low.isfinite() & high.isfinite()) or bool(low < 0):
        raise ArtifactError(
            f"{name}.scale holds {low.item():.3g} to {high.item():.3g}, but scales are finite and "
            f"zero or more; {AGAIN}"
        )
