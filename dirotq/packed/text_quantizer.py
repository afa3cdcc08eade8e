"""The transformers side of a packed text encoder: its ``quantization_config`` and its quantizer.

transformers finds both by the method's name once dirotq/_registration.py has seen it imported, in
``from_pretrained`` of 16-bit weights (which rounds them while they are read, one at a time) and of
packed ones. Weights alone are rounded: what a text encoder computes, it computes in 16 bits.
"""

import functools
import logging
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
from dirotq.kernels.weight_only import (
    Bits,
    SharedHead,
    WeightOnlyEmbedding,
    WeightOnlyLinear,
    rounded,
    takes,
    takes_embedding,
)

log = logging.getLogger(__name__)

METHOD = "dirotq"
FORMAT = 3
"""Newest format of packed text encoders: the first with packed embeddings."""
ELEMENTS: dict[int, Element] = {1: "int4", 2: "lm4", 3: "lm4"}
"""What a 4-bit code is, by format. 8-bit codes are the same in all. What has no packed embeddings
is written as the oldest that has its codes, which older DiRotQ read."""
OLDEST = {8: 1, 4: 2}
"""The format that is written without packed embeddings, by bits."""
PACKED = (WeightOnlyLinear, WeightOnlyEmbedding)
AGAIN = "download the model again, or pack it again with `dirotq compress`"


class Codes(dict[str, tuple[Tensor, Tensor]]):
    """``weight`` and ``scale`` of packed linears, by their paths; transformers copies configs, and
    copies none of them."""

    def __deepcopy__(self, memo: Any) -> "Codes":
        return self


@register_quantization_config(METHOD)
class TextEncoderConfig(QuantizationConfigMixin):
    """How a text encoder's weights are rounded.

    bits        4 (a scale per 64 columns; per 32 in format 1) or 8 (a scale per row)
    linears     paths of the packed ones; None, for 16-bit weights: those in repeated blocks
    embeddings  paths of what is packed to 8 bits whatever ``bits``: embeddings of tokens, and what
                shares their weights; None: those that can be, beside linears that are None
    format      of the files; None: the one that is written
    codes       of linears that are rounded already, in place of what is read; no file holds them

    Raises UnsupportedError for a newer format, ArtifactError for anything else that this version
    would not have written.
    """

    def __init__(
        self,
        bits: Any = None,
        linears: Any = None,
        embeddings: Any = None,
        format: Any = None,
        codes: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        **_: Any,
    ) -> None:
        if embeddings is None and linears is not None:
            embeddings = []
        if format is None:
            format = FORMAT if embeddings else OLDEST.get(bits, FORMAT)
        if type(format) is int and format > FORMAT:
            raise UnsupportedError(
                f"this text encoder is packed in format {format}; this DiRotQ reads up to "
                f"{FORMAT}. Upgrade: pip install -U dirotq"
            )
        known = all(
            paths is None or (isinstance(paths, list) and all(isinstance(p, str) for p in paths))
            for paths in (linears, embeddings)
        )
        least = FORMAT if embeddings else 1
        if type(format) is not int or format < least or bits not in get_args(Bits) or not known:
            raise ArtifactError(
                f"the quantization_config of this text encoder is damaged: format {format!r:.20}, "
                f"bits {bits!r:.20}, linears {linears!r:.60}, embeddings {embeddings!r:.60}, not a "
                f"number from 1 to {FORMAT}, 4 or 8, lists of paths; {AGAIN}"
            )
        self.quant_method = METHOD
        self.bits: Bits = bits
        self.linears: list[str] | None = linears
        self.embeddings: list[str] | None = embeddings
        self.format: int = format
        self.codes = Codes(codes or {})

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "format": self.format,
            "bits": self.bits,
            "linears": self.linears,
            **({"embeddings": self.embeddings} if self.embeddings else {}),
        }

    to_diff_dict = to_dict


@register_quantizer(METHOD)
class TextEncoderQuantizer(HfQuantizer):
    """Puts weight-only linears in the places of 16-bit ones; strict about every tensor."""

    requires_calibration = False
    quantization_config: TextEncoderConfig
    pre_quantized: bool
    is_trainable = False
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.linears is None:
            config.linears = packable(model, config.bits)
        if config.embeddings is None:
            config.embeddings, _ = token_embeddings(model)
            config.format = FORMAT if config.embeddings else OLDEST[config.bits]
        dtype = model.dtype
        put_weight_only(
            model, config.bits, config.linears, config.embeddings, ELEMENTS[config.format]
        )
        if not self.pre_quantized:
            _await_weights(model, dtype)
        self.dtypes = {name: tensor.dtype for name, tensor in model.named_parameters()}
        model.all_tied_weights_keys |= {
            _scale(name): _scale(other)
            for name, other in model.all_tied_weights_keys.items()
            if name.rpartition(".")[0] in config.embeddings
        }

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        packed = isinstance(model.get_submodule(path), PACKED)
        return not self.pre_quantized and packed and name == "weight"

    def get_quantize_ops(self) -> "_Round":
        return _Round(self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, PACKED):
                _check_numbers(name, module)
        for name, tensor in model.named_parameters():
            # transformers before 5.21 leaves what it renames in the dtype of the file.
            dtype = self.dtypes.get(name)
            if tensor.dtype == torch.bfloat16 and dtype in (torch.float16, torch.float32):
                tensor.data = tensor.data.to(dtype)
        self.pre_quantized = True
        if self.quantization_config.embeddings:
            model.resize_token_embeddings = functools.partial(_resize, model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Back to the stored dtype, as packed transformers are saved; what is tied stays tied, and
        of a scale that is tied one is saved, which transformers sees to for weights alone."""
        made: dict[tuple[int, torch.Size], Tensor] = {}
        tied = {name for name in model.all_tied_weights_keys if name.endswith(".scale")}
        state = {}
        for name, tensor in model.state_dict().items():
            if name in tied:
                continue
            same = (tensor.data_ptr(), tensor.shape)
            if tensor.is_floating_point():
                tensor = made.setdefault(same, tensor.to(torch.bfloat16))
            state[name] = tensor
        return state, {}


class _Round(ConversionOps):
    """Rounds one weight as it is read, unless it has codes."""

    def __init__(self, config: TextEncoderConfig) -> None:
        self.codes = config.codes

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **_: Any
    ) -> dict[str, Tensor]:
        (found,) = input_dict.values()
        weight = found[0] if isinstance(found, list) else found
        path = full_layer_name.rpartition(".")[0]
        if not weight.is_meta and not bool(torch.stack(weight.aminmax()).isfinite().all()):
            raise NumericalError(
                f"{path}: the weights hold NaN or infinity; the checkpoint is damaged"
            )
        packed = model.get_submodule(path)
        bits: Bits = 8 if isinstance(packed, WeightOnlyEmbedding) else packed.bits
        codes, scale = self.codes.get(path) or rounded(weight, bits)
        return {f"{path}.weight": codes, f"{path}.scale": scale.to(packed.scale.dtype)}


def packable(model: Any, bits: Bits) -> list[str]:
    """Return the paths of the linears in a text encoder's repeated blocks, in network order.

    Norms, what stands before and behind the blocks (``lm_head``, projections) and weights that are
    shared with another module stay in 16 bits, but for those of :func:`token_embeddings`.
    """
    tied = {name.removesuffix(".weight") for name in _flat(model.all_tied_weights_keys)}
    blocks = [f"{n}." for n, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return [
        name
        for name, module in model.named_modules()
        if takes(module, bits) and name.startswith(tuple(blocks)) and name not in tied
    ]


def token_embeddings(model: Any) -> tuple[list[str], str]:
    """Return the paths of a text encoder's embeddings of tokens and of what shares their weights,
    stored ones first; or none, and why they stay in 16 bits.
    """
    try:
        rows = model.get_input_embeddings().weight.shape
    except (NotImplementedError, AttributeError):
        return [], "its class does not say which they are"
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, None] = {}
    for name, module in modules.items():
        if isinstance(module, nn.Embedding) and module.weight.shape == rows:
            weight = f"{name}.weight"
            stored = model.all_tied_weights_keys.get(weight, weight)
            sharing = (t for t, other in model.all_tied_weights_keys.items() if other == stored)
            found |= dict.fromkeys(n.rpartition(".")[0] for n in (stored, *sharing))
    parts = [modules[name] for name in found]
    for name, module in zip(found, parts, strict=True):
        if not takes_embedding(module) and not takes(module, 8):
            return [], f"{name} is a {type(module).__name__}"
    if len({id(part) for part in parts}) < len(parts):
        return [], f"{' and '.join(found)} are one module"
    return list(found), "" if found else "it has none"


def put_weight_only(
    model: Any, bits: Bits, linears: Iterable[str], embeddings: Iterable[str], element: Element
) -> None:
    """Put modules for codes in the places of these linears, and, of 8 bits, of these embeddings.

    Raises ArtifactError for a path of neither.
    """
    modules = dict(model.named_modules())
    wanted: list[tuple[str, Bits | None]] = [(name, bits) for name in linears]
    wanted += [(name, None) for name in embeddings]
    for name, width in wanted:
        like: Any = modules.get(name, model)
        packed: WeightOnlyEmbedding | WeightOnlyLinear
        if width is None and takes_embedding(like):
            packed = WeightOnlyEmbedding(like)
        elif takes(like, width or 8):
            packed = (WeightOnlyLinear if width else SharedHead)(like, width or 8, element)
            packed.widens = name.rpartition(".")[2] in (model._keep_in_fp32_modules or ())
        else:
            kind = "linear" if width else "embedding"
            raise ArtifactError(
                f"{name:.80} is packed by the config.json of this {type(model).__name__}, and is "
                f"no {kind} of it that takes {width or 8} bits; {AGAIN}"
            )
        for tensor in packed.parameters():
            # Or transformers draws codes that wait on the disk anew, of a normal distribution.
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]
        model.set_submodule(name, packed)


def _resize(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``resize_token_embeddings`` on 16-bit embeddings, in which new rows can be written
    (diffusers' textual inversions do). Raises UnsupportedError for embeddings that are tied or
    scaled."""
    config = model.config.quantization_config
    plain, *more = config.embeddings
    packed = model.get_submodule(plain)
    if more or packed.factor is not None:
        raise UnsupportedError(
            f"the embeddings of this {type(model).__name__} are packed, and can't be resized: "
            f"{', '.join(config.embeddings)} share their weights or are scaled. Give the pipeline "
            "the 16-bit text encoder, or pack the model with text_encoders=keep"
        )
    tokens = torch.arange(packed.num_embeddings, device=packed.weight.device)
    whole = nn.Embedding.from_pretrained(packed(tokens), padding_idx=packed.padding_idx)
    model.set_submodule(plain, whole)
    config.embeddings, config.format = [], OLDEST[config.bits]
    del model.resize_token_embeddings
    log.warning(
        "the token embeddings of this %s are in 16 bits again (%.0f MB more): they are resized",
        type(model).__name__, (whole.weight.nbytes - packed.weight.nbytes) / 1e6,
    )  # fmt: skip
    return model.resize_token_embeddings(*args, **kwargs)


def _await_weights(model: Any, dtype: torch.dtype) -> None:
    """Let packed modules await 16-bit weights: transformers before 5.23 casts what it reads to the
    dtype that is there, codes' int8, before it is rounded. Weights that no file has stay floating,
    which :func:`_check_numbers` refuses."""
    for module in model.modules():
        if isinstance(module, PACKED):
            module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)


def _scale(weight: str) -> str:
    return f"{weight.removesuffix('weight')}scale"


def _flat(tied: dict[str, Any]) -> Iterable[str]:
    for name, other in tied.items():
        yield name
        yield from [other] if isinstance(other, str) else other


def _check_numbers(name: str, packed: WeightOnlyLinear | WeightOnlyEmbedding) -> None:
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
