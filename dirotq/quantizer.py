"""The diffusers side of a packed transformer: its ``quantization_config`` and its quantizer.

diffusers calls the quantizer's methods in this order: ``maybe_update_loaded_keys`` (which tensors
the files hold), ``_process_model_before_weight_loading`` (modules are swapped, files checked), then
per tensor ``check_if_quantized_param`` / ``create_quantized_param``, and
``_process_model_after_weight_loading`` (the numbers are checked). Weights that are not in shards
diffusers reads before it asks the quantizer: if truncated, the error is diffusers' own.
"""

import enum
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.files.sums import check_part
from dirotq.kernels.formats.lm4 import LEVELS
from dirotq.kernels.formats.quantize_weight import appended_floor
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.linear import QuantLinear, frozen
from dirotq.models.family import Site
from dirotq.packed.adapters import without_adapters
from dirotq.packed.beside import ATTRIBUTE, Beside, read_beside
from dirotq.packed.config import check_places, read_packing
from dirotq.packed.dequantize import dequantize_sites
from dirotq.packed.guards import guard, unguard
from dirotq.packed.half import Lost
from dirotq.packed.swap import put_packed
from dirotq.runtime.accelerate import accelerate
from dirotq.sources.weights import open_weights

METHOD = "dirotq"
STORED = torch.bfloat16
"""dtype on disk of floating tensors, but for those in EXACT."""
EXACT = ("wglobal",)
"""Buffers of packed linears that are float32 on disk too."""
DAMAGED = "the file is damaged; download it again, or pack the model again with `dirotq compress`"
FLOOR_GRACE = 2.0**-6
"""Part of its least value that a scale may lack: gptq and fuse may round wp on two machines."""


class _Method(enum.StrEnum):
    # diffusers reads `.value` of the method: a plain string would not do.
    DIROTQ = METHOD


class DirotqConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed transformer: one entry per site, in network order.

    Raises what :func:`read_packing` raises.
    """

    def __init__(
        self, *, sites: Any = None, format: Any = None, levels: Any = None, **_: Any
    ) -> None:
        self._entries = read_packing(sites, format, levels)
        self.quant_method = _Method.DIROTQ
        self.format: int = format
        self.sites: list[dict[str, Any]] = sites
        self.levels: list[float] | None = levels

    @classmethod
    def of(cls, sites: Iterable[tuple[Site, QuantSpec]]) -> "DirotqConfig":
        entries = list(sites)
        plain = [{"site": s.recorded(), "spec": spec.to_dict()} for s, spec in entries]
        lm4 = any(spec.weights.element == "lm4" for _, spec in entries)
        since = max((spec.since for _, spec in entries), default=1)
        return cls(sites=plain, format=since, levels=list(LEVELS) if lm4 else None)

    def entries(self) -> list[tuple[Site, QuantSpec]]:
        return list(self._entries)

    def to_dict(self) -> dict[str, Any]:
        levels = {} if self.levels is None else {"levels": self.levels}
        return {"quant_method": METHOD, "format": self.format, **levels, "sites": self.sites}

    to_diff_dict = to_dict


class DirotqQuantizer(DiffusersQuantizer):
    """Rebuilds packed modules on load; strict about every tensor."""

    requires_calibration = False  # it does; what diffusers says of that helps nobody
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: DirotqConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._found: dict[str, Signature] | None = None
        self._dtype: torch.dtype | None = None
        self._lost: dict[str, Lost] = {}
        self._beside: Beside | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise UnsupportedError for weights that are not packed yet: that takes calibration."""
        if not self.pre_quantized:
            raise UnsupportedError(
                "a DirotqConfig tells how a transformer is packed, and these weights are not: "
                "packing takes calibration, `dirotq compress model=FOLDER`. What it writes loads "
                "without a quantization_config"
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        self._dtype = torch_dtype or torch.float32  # diffusers' default, which it notes then
        return self._dtype

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        found = {}
        for folder in {Path(file).parent for file in checkpoint_files}:
            check_part(folder)
            self._beside = read_beside(folder)
        packed = {site.name for site, _ in self.quantization_config.entries()}
        for file in checkpoint_files:
            with open_weights(Path(file)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    tensor = tensors.get_slice(name)
                    found[name] = Signature(tuple(tensor.get_shape()), tensor.get_dtype())
                    ignored = name.rpartition(".")[0] not in packed
                    if self._dtype is torch.float16 and ignored and tensor.get_dtype() == "BF16":
                        self._lost[name] = Lost.of(tensors.get_tensor(name))
        self._found = found
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        entries = self.quantization_config.entries()
        check_places(model, entries)
        put_packed(model, entries)
        if self._found is not None:
            hold_tensors(model, self._found)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, *args: Any, **kwargs: Any
    ) -> bool:
        return isinstance(model.get_submodule(param_name.rpartition(".")[0]), QuantLinear)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # From the file, not from `param_value`, which diffusers has already cast to torch_dtype.
        module, _, buffer = param_name.rpartition(".")
        packed = model.get_submodule(module)
        setattr(packed, buffer, frozen(state_dict[param_name].to(target_device)))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, QuantLinear):
                check_numbers(name, module)
        accelerate(model, compile=True, graphs=True)
        model.to_json_string = functools.partial(_config_without_path, model)
        guard(model)
        setattr(model, ATTRIBUTE, self._beside)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Back to the stored dtype, so that load and save in any compute dtype changes no byte."""
        state_dict = without_adapters(state_dict)
        stored = {n: t.to(stored_dtype(n, t)) for n, t in state_dict.items()}
        changed = {n: lost.put_back(state_dict[n]) for n, lost in self._lost.items() if n in stored}
        return stored | changed, {}

    def _dequantize(self, model: Any) -> Any:
        """Put 16-bit linears in the place of the packed ones; it is a plain diffusers model then.

        Raises what :func:`dequantize_sites` raises.
        """
        dequantize_sites(model, (site for site, _ in self.quantization_config.entries()))
        accelerate(model, compile=False, graphs=False)
        unguard(model)
        del model.quantization_method
        kept = {k: v for k, v in model.config.items() if k != "quantization_config"}
        model._internal_dict = type(model.config)(kept)
        return model


def mark_packed(transformer: Any, config: DirotqConfig) -> None:
    """Make ``save_pretrained`` of a freshly packed transformer write what the loader reads."""
    transformer.hf_quantizer = DirotqQuantizer(config, pre_quantized=True)
    transformer.register_to_config(quantization_config=config)
    transformer.to_json_string = functools.partial(_config_without_path, transformer)


def stored_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """Return the dtype on disk of a tensor of a packed transformer's state."""
    exact = not tensor.is_floating_point() or name.rpartition(".")[2] in EXACT
    return tensor.dtype if exact else STORED


class Signature(NamedTuple):
    """Shape and dtype of a stored tensor, the latter as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Signature":
        """Return what a tensor of the model is stored as."""
        names = {torch.uint8: "U8", torch.int8: "I8", torch.float32: "F32"}
        return cls(tuple(tensor.shape), names.get(stored_dtype(name, tensor), "BF16"))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def hold_tensors(transformer: nn.Module, found: Mapping[str, Signature]) -> None:
    """Hold the files' tensors against a transformer with packed linears in their places.

    Raises ArtifactError naming the first that differ.
    """
    wanted = {n: Signature.of(n, t) for n, t in transformer.state_dict().items()}
    missing = sorted(wanted.keys() - found.keys())
    extra = sorted(found.keys() - wanted.keys())
    different = sorted(n for n in wanted.keys() & found.keys() if wanted[n] != found[n])
    problems = [f"{name} is missing" for name in missing]
    problems += [f"{name} belongs to no layer of this model" for name in extra]
    problems += [f"{name} is {found[name]}, expected {wanted[name]}" for name in different]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ArtifactError(
            f"the packed transformer does not fit its config: {'; '.join(problems[:3])}{more}. "
            "The files are damaged or mixed from two models; pack or download them again."
        )


def check_numbers(name: str, packed: QuantLinear) -> None:
    """Hold a packed linear's numbers against what the kernels rely on, where its tensors lie.

    Tensors that were offloaded while loading are on the meta device and are passed over.

    Raises ArtifactError naming the first tensor with NaN or infinity, with a negative scale (or a
    global scale of zero), or with a channel scale that is too small (docs/method.md Eq. 9).
    """
    tensors = {
        n: t for n, t in packed.named_parameters() if t.is_floating_point() and not t.is_meta
    }
    for buffer, tensor in tensors.items():
        low, high = tensor.aminmax()  # NaN comes out on top: one pass, and no mask in memory
        if not bool(low.isfinite() & high.isfinite()):
            raise ArtifactError(f"{name}.{buffer} holds NaN or infinity: {DAMAGED}")
        if buffer in ("wscale", "wpscale") and bool(low < 0):
            raise ArtifactError(
                f"{name}.{buffer} holds {low.item():.3g}, but scales are zero or more: {DAMAGED}"
            )
        if buffer == "wglobal" and not bool(low > 0):
            raise ArtifactError(
                f"{name}.wglobal is {low.item():.3g}, but a global scale is above zero: {DAMAGED}"
            )
    if packed.wscale.dtype == torch.uint8 and not packed.wscale.is_meta:
        _check_scale_bytes(name, packed)
    floor = appended_floor(packed.spec, tensors.get("wp"), tensors.get("bias"))
    if floor is None or "wscale" not in tensors:
        return
    missing = floor.float() * (1 - FLOOR_GRACE) - packed.wscale.float()
    if bool((missing > 0).any()):
        row = int(missing.argmax())
        raise ArtifactError(
            f"{name}.wscale is {packed.wscale[row].item():.3g} in row {row}, too small for the "
            f"row's wp and bias, which need {floor[row].item():.3g} (docs/method.md Eq. 9): the "
            "model was packed by an older DiRotQ or the file is damaged; pack it again with "
            "`dirotq compress`"
        )


def _check_scale_bytes(name: str, packed: QuantLinear) -> None:
    # E4M3 ends at byte 126, 448 (then come NaN and negative numbers), E8M0 at 254.
    largest = 126 if packed.spec.weights.name == "nvfp4" else 254
    found = int(packed.wscale.max()) if packed.wscale.numel() else 0
    if found > largest:
        raise ArtifactError(
            f"{name}.wscale holds the byte {found}, NaN or a negative number as a scale of "
            f"{packed.spec.weights.name}, which are 0 ... {largest}: {DAMAGED}"
        )


def _config_without_path(self: ConfigMixin) -> str:
    """Leave out where diffusers loaded from, which it notes in the config."""
    self._internal_dict = type(self._internal_dict)(
        {key: value for key, value in self._internal_dict.items() if key != "_name_or_path"}
    )
    return type(self).to_json_string(self)


# diffusers offers no entry point for quantizers; its two tables are where it looks (ADR 0006).
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = DirotqConfig
AUTO_QUANTIZER_MAPPING[METHOD] = DirotqQuantizer
