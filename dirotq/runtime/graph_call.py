"""One call of a forward, taken apart: its tensors, and everything else as a key."""

import inspect
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

PLAIN = (bool, int, float, complex, str, type(None))
"""Types whose values are part of the key."""
ADAPTERS = "attention_kwargs"
"""End of the names of arguments that carry a LoRA's scale, which a decorator of diffusers takes."""


class NotGraphable(Exception):
    """Why a call can't be recorded; the original forward makes it instead."""


class Call(NamedTuple):
    """The arguments of a call by name, defaults filled in, without their tensors.

    ``form``     the rest: names, containers, plain values, and of every tensor shape, dtype, device
    ``tensors``  in the order in which ``form`` names them
    """

    form: Hashable
    tensors: list[Tensor]

    @classmethod
    def of(
        cls, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> "Call":
        """Take the arguments of a call apart.

        Raises NotGraphable on anything that is neither a tensor, a plain value, nor a tuple, list
        or dict of these, and on a LoRA's scale that comes without a name; TypeError if the
        arguments don't fit the signature.
        """
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            if name.endswith(ADAPTERS) and value and name not in kwargs:
                raise NotGraphable(f"its {name} are not given by name, and diffusers ignores them")
        tensors: list[Tensor] = []
        return cls(_form(dict(bound.arguments), tensors), tensors)

    def bind(self, signature: inspect.Signature, tensors: list[Tensor]) -> inspect.BoundArguments:
        """Return the same call with other tensors; by name, as diffusers' decorators look for
        arguments."""
        return inspect.BoundArguments(_by_name(signature), _value(self.form, iter(tensors)))


def check_result(value: Any) -> None:
    """Raise NotGraphable if a forward returns what a replay could not renew."""
    for leaf in tree_leaves(value):
        if not isinstance(leaf, Tensor) and type(leaf) not in PLAIN:
            raise NotGraphable(f"its result holds a {type(leaf).__name__}")


def copied(value: Any) -> Any:
    """Copy the tensors in the same containers (diffusers registers its outputs with pytree)."""
    return tree_map_only(Tensor, torch.clone, value)


def _by_name(signature: inspect.Signature) -> inspect.Signature:
    named = inspect.Parameter.KEYWORD_ONLY
    parameters = list(signature.parameters.values())
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return signature
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return signature.replace(
        parameters=[p.replace(kind=named) if p.kind is either else p for p in parameters]
    )


def _form(value: Any, tensors: list[Tensor]) -> Hashable:
    # Exact types only: what a subclass means, its class alone knows.
    kind = type(value)
    if kind is Tensor or kind is torch.nn.Parameter:
        if value.layout is not torch.strided:
            raise NotGraphable(f"an argument is a tensor of layout {value.layout}")
        tensors.append(value)
        return Tensor, value.shape, value.dtype, value.device
    if kind in PLAIN:
        return kind, value  # with its type: True == 1 == 1.0
    if kind is tuple or kind is list:
        return kind, tuple(_form(item, tensors) for item in value)
    if kind is dict:
        names = tuple(value)
        if all(type(name) in PLAIN for name in names):
            return dict, names, tuple(_form(item, tensors) for item in value.values())
    raise NotGraphable(f"an argument is or holds a {kind.__name__}")


def _value(form: Any, tensors: Iterator[Tensor]) -> Any:
    kind, *rest = form
    if kind is Tensor:
        return next(tensors)
    if kind is tuple or kind is list:
        return kind(_value(item, tensors) for item in rest[0])
    if kind is dict:
        return dict(zip(rest[0], [_value(item, tensors) for item in rest[1]], strict=True))
    return rest[0]
