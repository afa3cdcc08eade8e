"""A transformer without its weights, and what comes into it and goes again, by name."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def empty_transformer(config: dict[str, Any], cls: Any, *, buffers: bool = True) -> Any:
    """Make a diffusers transformer whose parameters have no memory yet; buffers have values.

    Of a packed transformer's config it is the 16-bit one. Other models of diffusers are made too.

    buffers  False: they have none either. SD3 computes its positions for seconds, which is too long
             where names and shapes are all that is asked
    """
    import accelerate
    from diffusers.models.modeling_utils import no_init_weights

    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    where = accelerate.init_empty_weights() if buffers else torch.device("meta")
    with where, no_init_weights():
        return cls.from_config(plain).eval()


def names_in(root: nn.Module, block: str) -> list[str]:
    """Name the tensors that ``block`` of ``root`` stores."""
    return [f"{block}.{name}" for name in root.get_submodule(block).state_dict()]


def names_outside(root: nn.Module, blocks: Iterable[str]) -> list[str]:
    """Name the tensors that ``root`` stores outside of ``blocks``."""
    inside = tuple(f"{block}." for block in blocks)
    return [name for name in root.state_dict() if not name.startswith(inside)]


def drop(root: nn.Module, names: Iterable[str]) -> None:
    """Free the named tensors: back to the meta device. Names that are gone are passed over."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        try:
            module = root.get_submodule(path)
        except AttributeError:
            continue  # another module was put in its place
        for tensors in (module._parameters, module._buffers):
            if (tensor := tensors.get(leaf)) is not None:
                assign(module, leaf, torch.empty_like(tensor, device="meta"))


def move_buffers(root: nn.Module, device: torch.device) -> None:
    """Move the buffers that have values: those that no file holds were computed at construction."""
    for module in root.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of the module's parameter or buffer of that name."""
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor
