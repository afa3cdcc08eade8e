"""A network that runs without its weights: true shapes and control flow, noise for numbers.

On the meta device a forward stops where it asks for a value: how many tokens does this mask leave?
Here activations have values and memory, on the CPU. What depends on the call alone (masks, lengths,
positions, timesteps) is what it is in earnest. Weights are noise that takes no memory. Large
products, which would take the time, are made up too, and so is what is computed from them.
"""

import copy
import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NOISE = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) / 10
COSTLY = 1 << 24
"""Multiplications from which on a product is not computed."""
LARGE = 1 << 18
"""Elements from which on what is made up is zeros, whose memory nobody touches, and not noise."""
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "convolution"}
PRODUCTS |= {"_scaled_dot_product_flash_attention_for_cpu"}
ELEMENTWISE = {"clone", "_to_copy", "cat", "_softmax", "native_layer_norm", "_fused_rms_norm"}
"""What costs as much as an operation with the tag ``pointwise``, and is as indifferent."""

EAGER_FLEX = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
"""What keeps flex attention from compiling itself, where torch has it."""


def hollow(network: nn.Module) -> Any:
    """Copy a network to the CPU without its parameters' memory; buffers keep their values.

    network  real or on the meta device; it is left as it is. Buffers on that device become noise
    """
    tensors = [t for t in (*network.parameters(), *network.buffers()) if not _has_value(t)]
    twin = copy.deepcopy(network, {id(tensor): _noise(tensor) for tensor in tensors}).to("cpu")
    for module in twin.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                setattr(module, name, _noise(value) if value.is_meta else value.cpu())
    return twin


class Cheaply(TorchDispatchMode):
    """Makes large products, and what is computed from them, something of the right shape."""

    supports_higher_order_operators = True  # flex attention is one

    def __init__(self) -> None:
        super().__init__()
        # A storage that someone points at, be it weakly, gives its address to no other one.
        self.made_up: dict[int, StorageWeakRef] = {}

    def __enter__(self) -> Self:
        # No compiler looks into this mode, and without one scores take memory: see `_attended`.
        self.eager = vars(flex).get(EAGER_FLEX)
        if self.eager is not None:
            setattr(flex, EAGER_FLEX, True)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.eager is not None:
            setattr(flex, EAGER_FLEX, self.eager)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if op is flex.flex_attention_hop:
            return self._attended(*args[:3])
        if not isinstance(op, OpOverload):
            return op(*args, **kwargs)
        if not self._is_idle(op, args):
            return op(*args, **kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        return tree_map_only(Tensor, self._made, op(*args, **kwargs))

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return what flex attention does: the result, and two numbers for each query."""
        row = query.new_empty(query.shape[:-1], device="meta")
        result = query.new_empty((*row.shape, value.shape[-1]), device="meta")
        return self._made(result), self._made(row), self._made(row)

    def _is_idle(self, op: Any, args: tuple[Any, ...]) -> bool:
        """Tell whether its result may be made up: a costly product, or made of what is made up."""
        name = op.overloadpacket.__name__
        if op._schema.is_mutable:
            return False
        given = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        made_up = any(
            t.numel() > LARGE and t.untyped_storage()._cdata in self.made_up for t in given
        )
        if name in PRODUCTS:
            # A router's scores are small, but zeros would send every token to the same expert.
            return made_up or _is_costly(args)
        alike = torch.Tag.pointwise in op.tags or name in ELEMENTWISE
        return alike and made_up and all(t.is_floating_point() for t in given)

    def _made(self, shape: Tensor) -> Tensor:
        made = _filled(shape)
        storage = made.untyped_storage()
        if made.numel() > LARGE:
            self.made_up[storage._cdata] = StorageWeakRef(storage)
        return made


def _has_value(tensor: Tensor) -> bool:
    return not (isinstance(tensor, nn.Parameter) or tensor.is_meta)


def _noise(tensor: Tensor) -> Any:
    """Return windows of one strip of noise: rows differ, memory is shared."""
    length = sum(tensor.shape) + 1
    strip = NOISE.repeat(math.ceil(length / len(NOISE))).to(tensor.dtype)
    if tensor.ndim < 2:
        strip = strip.abs()  # a model may take its root or logarithm
    windows = strip.as_strided(tensor.shape, (1,) * tensor.ndim)
    return nn.Parameter(windows, False) if isinstance(tensor, nn.Parameter) else windows


def _is_costly(args: tuple[Any, ...]) -> bool:
    sizes = sorted(t.numel() for t in args if isinstance(t, Tensor) and t.is_floating_point())
    # [M, K] times [K, N] takes M N K multiplications: the sizes' product, divided by K.
    return len(sizes) > 1 and sizes[-1] * sizes[-2] > COSTLY * max(args[0].shape[-1], 1)


def _filled(shape: Tensor) -> Tensor:
    size = shape.numel()  # results are dense
    if size > LARGE or not shape.is_floating_point():
        flat = torch.from_numpy(np.zeros(size * shape.element_size(), np.uint8)).view(shape.dtype)
    else:
        flat = NOISE.repeat(math.ceil(size / len(NOISE)))[:size].to(shape.dtype)
    return flat.as_strided(shape.shape, shape.stride())
