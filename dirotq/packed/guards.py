"""diffusers' own habits on a packed transformer: what works is let through, what would go wrong in
silence is refused.

What is put on an object is a functools.partial: it pickles and deep-copies, unlike bound methods.
"""

import functools
import inspect
import logging
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import nn

from dirotq.errors import UnsupportedError
from dirotq.kernels.linear import PointwiseView, QuantLinear, SiteView
from dirotq.packed.adapters import guard_adapters, refuse_fused

log = logging.getLogger(__name__)

PACKED = (QuantLinear, SiteView, PointwiseView)
casting: ContextVar[bool] = ContextVar("casting", default=False)
"""Whether a pipeline casts its components (dirotq/packed/pipelines.py)."""


def guard(transformer: Any) -> None:
    """Prepare a packed transformer that was just loaded for what diffusers does to any, in place.

    Its pipeline may cast it (``from_pipe``). It is saved as safetensors whatever is asked for,
    counts the parameters that it stands for, refuses 16-bit weights, takes ``fuse_qkv_projections``
    as said already, and is refused by diffusers' ``from_transformer``, which would copy nothing.
    """
    for name, answer in (
        ("to", _to),
        ("save_pretrained", _save_pretrained),
        ("num_parameters", _num_parameters),
        ("fuse_qkv_projections", _fused_already),
    ):
        if hasattr(transformer, name):
            setattr(transformer, name, functools.partial(answer, transformer))
    for module in transformer.modules():
        if isinstance(module, PACKED):
            module.register_load_state_dict_pre_hook(_refuse_weights)
    guard_adapters(transformer)
    _guard_copies()


def unguard(transformer: Any) -> None:
    """Give a transformer that is packed no more the methods of its class back."""
    for name, value in list(vars(transformer).items()):
        if isinstance(value, functools.partial) and value.func.__module__.startswith("dirotq."):
            delattr(transformer, name)


def is_packed(model: Any) -> bool:
    """Tell whether a model holds packed linears."""
    return isinstance(model, nn.Module) and any(isinstance(m, PACKED) for m in model.modules())


def _to(transformer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``ModelMixin.to``. diffusers refuses another dtype, and breaks pipelines half-way: what
    a pipeline asks for (``pipe.to``, ``from_pipe``) casts what is in 16 bits, and packed tensors
    keep theirs (``QuantLinear._apply``)."""
    transformer.is_quantized = not casting.get()
    try:
        return type(transformer).to(transformer, *args, **kwargs)
    finally:
        transformer.is_quantized = True


def _save_pretrained(
    transformer: Any,
    save_directory: Any,
    is_main_process: bool = True,
    save_function: Any = None,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    push_to_hub: bool = False,
    use_flashpack: bool = False,
    **kwargs: Any,
) -> None:
    """Call ``ModelMixin.save_pretrained``, as safetensors: no loader of packed folders opens
    anything else. Raises UnsupportedError for FlashPack, which keeps one dtype for all."""
    refuse_fused(transformer)
    if use_flashpack:
        raise UnsupportedError(
            "a packed transformer is saved as safetensors only: FlashPack casts every tensor to "
            "one dtype, and codes are none. Leave out use_flashpack=True"
        )
    if not safe_serialization:
        log.warning(
            "safe_serialization=False: the packed %s is saved as safetensors all the same; a "
            "pickle can run code when loaded, and DiRotQ opens none",
            type(transformer).__name__,
        )
    type(transformer).save_pretrained(
        transformer, save_directory, is_main_process, save_function, True, variant,
        max_shard_size, push_to_hub, **kwargs,
    )  # fmt: skip


def _num_parameters(
    transformer: Any, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """Count parameters as of the 16-bit network: a packed linear stands for [N, D] and a bias."""
    count = type(transformer).num_parameters(transformer, only_trainable, exclude_embeddings)
    if only_trainable:
        return count
    for module in transformer.modules():
        if isinstance(module, QuantLinear):
            bias = 0 if module.bias is None else module.bias.numel()
            count += module.spec.outputs * module.spec.in_features + bias
            count -= sum(tensor.numel() for tensor in module.parameters())
    return count


def _fused_already(transformer: Any) -> None:
    """Do nothing: q, k and v are one packed linear, with nothing to concatenate."""


def _refuse_weights(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    if f"{prefix}weight" in state_dict:
        raise UnsupportedError(
            f"{prefix}weight can't be loaded: {prefix.removesuffix('.')} is packed to 4 bits, and "
            "the rest of these weights would be mixed into another model. Pack the model that they "
            "belong to: `dirotq compress model=FOLDER`"
        )


def _guard_copies() -> None:
    """Wrap every ``from_transformer`` of diffusers that copies weights, once: they do it without
    looking (``strict=False``), and what they make of a packed transformer is random."""
    import diffusers.models.controlnets

    for cls in vars(diffusers.models.controlnets).values():
        made = vars(cls).get("from_transformer") if isinstance(cls, type) else None
        if not isinstance(made, classmethod) or hasattr(made.__func__, "__wrapped__"):
            continue
        if "load_weights_from_transformer" in inspect.signature(made.__func__).parameters:
            cls.from_transformer = classmethod(_refusing(made.__func__))


def _refusing(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def from_transformer(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(map(is_packed, (*args, *kwargs.values()))):
            raise UnsupportedError(
                f"{cls.__name__}.from_transformer copies 16-bit weights, and this transformer is "
                "packed to 4 bits: nothing of its blocks would arrive. Give it the 16-bit "
                "transformer that was packed; the ControlNet then works beside the packed one"
            )
        return make(cls, *args, **kwargs)

    return from_transformer
