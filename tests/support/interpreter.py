"""Triton's interpreter, faster: a reduction with a function of ours works on slices.

The interpreter calls the function once per element, in Python, and that took nine tenths of the
time of the kernels that reduce so. The order along the axis stays the same.
"""

from typing import Any

import numpy as np
from triton.runtime import interpreter

by_element = interpreter.ReduceOps.generic_reduce


def by_slice(self: Any, input: tuple[Any, ...]) -> Any:
    """``ReduceOps.generic_reduce`` for reductions along one axis; others it leaves to its own."""
    if self.axis is None:
        return by_element(self, input)
    dtypes = [block.dtype for block in input]
    slices = [np.moveaxis(block.handle.data, self.axis, 0) for block in input]

    def tensors(values: Any) -> tuple[Any, ...]:
        return tuple(self.to_tensor(value, dtype) for value, dtype in zip(values, dtypes))

    found, *rest = map(tensors, zip(*slices))
    for more in rest:
        combined = self.combine_fn.fn(*found, *more)
        combined = combined if isinstance(combined, tuple) else (combined,)
        found = tensors(value.handle.data.reshape(slices[0].shape[1:]) for value in combined)
    if not self.keep_dims:
        return list(found)
    return list(tensors(np.expand_dims(value.handle.data, self.axis) for value in found))


def install() -> None:
    interpreter.ReduceOps.generic_reduce = by_slice
