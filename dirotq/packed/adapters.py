"""Adapters on a packed transformer: what diffusers' methods do, checked before and made good after.

A LoRA that does not fit is refused before anything of it is loaded: diffusers warns of keys that
belong to no layer, and loads the rest.
"""

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dirotq.errors import UnsupportedError
from dirotq.kernels.linear import PointwiseView, QuantLinear, SiteView, rows_of
from dirotq.runtime.own_modules import own_modules
from dirotq.sources.lora import refuse_kinds, refuse_misfits
from dirotq.sources.lora_files import FUSE, pairs_in

METHODS = (
    "add_adapter", "delete_adapters", "disable_adapters", "disable_lora", "enable_adapters",
    "enable_lora", "fuse_lora", "load_lora_adapter", "set_adapter", "set_adapters", "unfuse_lora",
    "unload_lora",
)  # fmt: skip
"""Of a transformer, by which adapters change."""
FETCHED = (
    "weight_name", "local_files_only", "cache_dir", "force_download", "proxies",
    "token", "revision", "subfolder",
)  # fmt: skip
BIAS = ".lora_B.bias"


def guard_adapters(transformer: Any) -> None:
    """Check, on this object, what its methods load, and let packed linears follow at once."""
    for name in METHODS:
        if hasattr(transformer, name):
            setattr(transformer, name, functools.partial(_changed, transformer, name))


def tensors_of(given: Any, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read what diffusers' loaders of LoRAs were given: tensors, a file, a folder or a repository.

    Raises what diffusers raises.
    """
    if isinstance(given, Mapping):
        return dict(given)
    from diffusers.loaders.lora_base import _fetch_state_dict  # imports models, which import us

    chosen: dict[str, Any] = {name: options.get(name) for name in FETCHED}
    wanted = options.get("use_safetensors")
    chosen["use_safetensors"] = True if wanted is None else wanted
    agent = {"file_type": "attn_procs_weights", "framework": "pytorch"}
    pickles = wanted is None  # diffusers' rule; of pickles it reads tensors alone
    state, _ = _fetch_state_dict(given, user_agent=agent, allow_pickle=pickles, **chosen)
    return dict(state)


def check_fits(transformer: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Hold a LoRA in diffusers' names against a transformer.

    Raises UnsupportedError for other kinds of adapters, ConfigError naming the first parts that fit
    no layer.
    """
    refuse_kinds(name, tensors)
    pairs, rest = pairs_in(tensors, name)
    if odd := sorted(key for key in rest if not key.endswith(BIAS)):
        raise UnsupportedError(
            f"{name} holds more than pairs of matrices: {len(odd)} tensors, such as {odd[:3]}. "
            f"Without them the images would not be the LoRA's. {FUSE}"
        )
    refuse_misfits(name, pairs, _shapes(transformer))


def refuse_fused(transformer: nn.Module) -> None:
    """Raise UnsupportedError if a LoRA was fused, which a packed folder can't hold."""
    for name, module in transformer.named_modules():
        if isinstance(module, QuantLinear) and module.updates and module.updates.fixed:
            raise UnsupportedError(
                f"a LoRA is fused into {name}, and a packed folder holds none beside the branch: "
                "unfuse_lora() and save it with save_lora_weights, or compress the model with "
                "model.lora=FILE"
            )


def without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a transformer's state as it is without peft's layers around some of its own."""
    own = {key: tensor for key, tensor in state.items() if ".lora_" not in key}
    return {key.replace(".base_layer.", "."): tensor for key, tensor in own.items()}


def has_adapters(transformer: nn.Module) -> bool:
    """Tell whether peft's layers stand in a transformer."""
    return any(hasattr(m, "base_layer") for m in transformer.modules())


def _changed(transformer: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    if name == "add_adapter":
        _refuse_others(*args, **kwargs)
    if name == "load_lora_adapter":
        _check_loaded(transformer, *args, **kwargs)
    result = getattr(type(transformer), name)(transformer, *args, **kwargs)
    modules = list(own_modules(transformer))
    # What group offloading takes away may hold anything.
    away = any("_diffusers_hook" in vars(module) for module in modules)
    for module in modules:
        if not isinstance(module, QuantLinear) or module.updates is None:
            continue
        if name == "unload_lora":
            module.updates.detach()
        if not away:
            module.renew()
    return result


def _refuse_others(adapter_config: Any, *_: Any, **__: Any) -> None:
    kind = getattr(adapter_config, "peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedError(
            f"an adapter of the kind {getattr(kind, 'value', kind)} is no low-rank update of a "
            f"packed linear. {FUSE}"
        )


def _check_loaded(
    transformer: Any, given: Any, prefix: Any = "transformer", *_: Any, **options: Any
) -> None:
    name = f"the LoRA {given}" if isinstance(given, str) else "this LoRA"
    tensors = tensors_of(given, options)
    if prefix is not None:
        start = f"{prefix}."
        tensors = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    check_fits(transformer, tensors, name)


def _shapes(transformer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every layer's weight, by the layer's name without peft's layers."""
    found: dict[str, tuple[int, ...]] = {}
    for name, module in transformer.named_modules():
        key = f"{name.replace('.base_layer', '')}.weight"
        if isinstance(module, QuantLinear | SiteView | PointwiseView):
            linear, rows = rows_of(module)
            found[key] = (rows.stop - rows.start, linear.in_features)
        elif ".lora_" not in name and isinstance(weight := getattr(module, "weight", None), Tensor):
            found.setdefault(key, tuple(weight.shape))
    return found
