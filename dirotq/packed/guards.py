"""diffusers' own habits on a packed transformer: what works is let through, what would go wrong in
silence is refused.

What is put on an object is a functools.partial: it pickles and deep-copies, unlike bound methods.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from dirotq.errors import UnsupportedError
from dirotq.kernels.linear import PointwiseView, QuantLinear, SiteView

PACKED = (QuantLinear, SiteView, PointwiseView)


def guard(transformer: Any) -> None:
    """Prepare a packed transformer that was just loaded for what diffusers does to any, in place.

    It may be cast (``from_pipe``), refuses 16-bit weights, takes ``fuse_qkv_projections`` as said
    already, and is refused by diffusers' ``from_transformer``, which would copy nothing of it.
    """
    transformer.to = functools.partial(_to, transformer)
    if hasattr(transformer, "fuse_qkv_projections"):
        transformer.fuse_qkv_projections = functools.partial(_fused_already, transformer)
    for module in transformer.modules():
        if isinstance(module, PACKED):
            module.register_load_state_dict_pre_hook(_refuse_weights)
    _guard_copies()


def is_packed(model: Any) -> bool:
    """Tell whether a model holds packed linears."""
    return isinstance(model, nn.Module) and any(isinstance(m, PACKED) for m in model.modules())


def _to(transformer: Any, *args: Any, **kwargs: Any) -> Any:
    """Call ``ModelMixin.to``, also to another dtype, which diffusers refuses: packed tensors keep
    theirs (``QuantLinear._apply``), only what is in 16 bits is cast."""
    transformer.is_quantized = False
    try:
        return type(transformer).to(transformer, *args, **kwargs)
    finally:
        transformer.is_quantized = True


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
