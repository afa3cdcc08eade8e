"""diffusers' loaders of LoRAs for whole pipelines, made right for packed transformers.

Files of other programs are converted by diffusers. Its converters pass over what they don't know
without a word; a file that is not used as a whole is refused here.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import diffusers.loaders.lora_pipeline as host
from torch import nn

from dirotq.packed.adapters import check_fits, tensors_of
from dirotq.packed.guards import PACKED, is_packed
from dirotq.sources.lora import refuse_kinds
from dirotq.sources.lora_files import converted_whole, with_alphas


def _checking(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_lora_weights(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Wan 2.2's expert of low noise is asked for by name.
        second = kwargs.get("load_into_transformer_2", False)
        target: Any = getattr(self, "transformer_2" if second else "transformer", None)
        if is_packed(target):
            first = next(iter(list(inspect.signature(load).parameters)[1:]))
            given = args[0] if args else kwargs.pop(first)
            name = "this LoRA" if isinstance(given, dict) else f"the LoRA {given}"
            tensors = tensors_of(given, kwargs)
            refuse_kinds(name, tensors)
            ready = with_alphas(tensors, name)
            made = converted_whole(tensors if ready is None else ready, type(self), name)
            # Before diffusers widens layers for it. Control LoRAs may read more channels.
            start, wider = f"{self.transformer_name}.", "x_embedder."
            own = {k.removeprefix(start): t for k, t in made.items() if k.startswith(start)}
            loras = {k: t for k, t in own.items() if ".lora" in k and not k.startswith(wider)}
            if loras:
                check_fits(target, loras, name)
            args = (given if ready is None else ready, *args[1:])
        return load(self, *args, **kwargs)

    return load_lora_weights


def _expanding(expand: Callable[..., Any]) -> Callable[..., Any]:
    """FLUX's loader widens a LoRA to the weights that it finds in the transformer's state. A packed
    linear has none there, and nothing to widen: it is held against the layers when it is loaded."""

    @functools.wraps(expand)
    def _maybe_expand_lora_state_dict(
        cls: Any, transformer: nn.Module, lora_state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        packed = {
            f"{cls.transformer_name}.{name.replace('.base_layer', '')}"
            for name, module in transformer.named_modules()
            if isinstance(module, PACKED)
        }
        ours = {k: v for k, v in lora_state_dict.items() if k.partition(".lora_")[0] in packed}
        rest = {k: v for k, v in lora_state_dict.items() if k not in ours}
        return {**expand(cls, transformer, rest), **ours}

    return _maybe_expand_lora_state_dict


_classes: list[Any] = [value for value in vars(host).values() if isinstance(value, type)]
for _class in _classes:
    _load = vars(_class).get("load_lora_weights")
    if inspect.isfunction(_load) and not hasattr(_load, "__dirotq__"):
        _class.load_lora_weights = _checking(_load)
        _class.load_lora_weights.__dirotq__ = True
    _expand = vars(_class).get("_maybe_expand_lora_state_dict")
    if isinstance(_expand, classmethod) and not hasattr(_expand.__func__, "__wrapped__"):
        _class._maybe_expand_lora_state_dict = classmethod(_expanding(_expand.__func__))
