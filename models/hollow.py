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
from torch.nn.attention import flex_attention as flex
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NOISE = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) / 10
COSTLY = 1 << 24
"""Multiplications from which on a product is not computed."""
LARGE = 1 << 18
"""Elements from which on what is made of noise is zeros, whose memory nobody touches."""
OPS = torch.ops.aten
PRODUCTS = {
    OPS.mm,
    OPS.addmm,
    OPS.bmm,
    OPS.baddbmm,
    OPS._grouped_mm,
    OPS.convolution,
    OPS._scaled_dot_product_flash_attention_for_cpu,
}
ELEMENTWISE = {
    OPS.clone,
    OPS._to_copy,
    OPS.cat,
    OPS._softmax,
    OPS.native_layer_norm,
    OPS._fused_rms_norm,
}
"""What costs as much as an operation with the tag ``pointwise``, and is as indifferent."""


def hollow(network: nn.Module) -> Any:
    """Copy a network to the CPU without its parameters' memory; buffers keep their values.

    network  real or on the meta device; it is left as it is. Buffers there become noise
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

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if op is flex.flex_attention_hop:
            return self._attended(*args[:3])
        if not isinstance(op, OpOverload):
            return op(*args, **kwargs)
        if not (self._is_idle(op, args) or op.overloadpacket in PRODUCTS and _is_costly(args)):
            return op(*args, **kwargs)
        shapes = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        return tree_map_only(Tensor, self._made, op(*shapes[0], **shapes[1]))

    def __enter__(self) -> Self:
        # A compiler can't look into this mode, and eager it materializes scores: see `_attended`.
        self.compiles = not flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = not self.compiles
        super().__exit__(*error)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return what flex attention does: the result, and two numbers for each query."""
        rows = query.shape[:-1]
        shapes = [
            query.new_empty(shape, device="meta") for shape in (rows, (*rows, value.shape[-1]))
        ]
        return self._made(shapes[1]), self._made(shapes[0]), self._made(shapes[0])

    def _is_idle(self, op: Any, args: tuple[Any, ...]) -> bool:
        """Tell whether it makes large floats from large made-up ones, and does nothing else."""
        if torch.Tag.pointwise not in op.tags and op.overloadpacket not in ELEMENTWISE:
            return False
        if op._schema.is_mutable:
            return False
        given = [value for value in tree_leaves(args) if isinstance(value, Tensor)]
        large = [tensor for tensor in given if tensor.numel() > LARGE]
        return any(t.untyped_storage()._cdata in self.made_up for t in large) and all(
            t.is_floating_point() for t in given
        )

    def _made(self, shape: Tensor) -> Tensor:
        made = _filled(shape)
        storage = made.untyped_storage()
        if made.numel() > LARGE:
            self.made_up[storage._cdata] = StorageWeakRef(storage)
        return made


def _has_value(tensor: Tensor) -> bool:
    return not (isinstance(tensor, nn.Parameter) or tensor.is_meta)


def _noise(tensor: Tensor) -> Any:
    """Return windows of one strip of noise, of the tensor's shape: rows differ, memory is shared."""
    length = sum(tensor.shape) + 1
    strip = NOISE.repeat(math.ceil(length / len(NOISE))).to(tensor.dtype)
    if tensor.ndim < 2:
        strip = strip.abs()  # a model may take its logarithm or root
    windows = strip.as_strided(tensor.shape, (1,) * tensor.ndim)
    return nn.Parameter(windows, False) if isinstance(tensor, nn.Parameter) else windows


def _is_costly(args: tuple[Any, ...]) -> bool:
    factors = sorted(t.numel() for t in args if isinstance(t, Tensor) and t.is_floating_point())
    # Of [M, K] times [K, N] the sizes bound the work from below by M K N = MK KN / K.
    return len(factors) > 1 and math.prod(factors[-2:]) > COSTLY * max(args[0].shape[-1], 1)


def _filled(shape: Tensor) -> Tensor:
    size = shape.numel()  # results are dense
    if size > LARGE or not shape.is_floating_point():
        flat = torch.from_numpy(np.zeros(size * shape.element_size(), np.uint8)).view(shape.dtype)
    else:
        flat = NOISE.repeat(math.ceil(size / len(NOISE)))[:size].to(shape.dtype)
    return flat.as_strided(shape.shape, shape.stride())
