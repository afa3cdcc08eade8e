"""``torch.ops.dirotq.quant_linear``: a packed linear as one operator.

One operator, so that the plan is chosen when it runs, by the rows it then has: ``torch.compile``
sees a single node whatever M is, and a CUDA graph captures the kernels that were chosen.
"""

import functools
import json

import torch
from torch import Tensor

from . import engine
from .buffers import Packed
from .chip import capability
from .formats.spec import QuantSpec
from .plan import choose


@functools.lru_cache(maxsize=4096)
def spec_from_key(key: str) -> QuantSpec:
    return QuantSpec.from_dict(json.loads(key))


def spec_key(spec: QuantSpec) -> str:
    """Return a spec as an operator's argument."""
    return json.dumps(spec.to_dict())


@torch.library.custom_op("dirotq::quant_linear", mutates_args=())
def quant_linear(
    x: Tensor,
    qweight: Tensor,
    wscale: Tensor,
    wglobal: Tensor | None,
    basis: Tensor | None,
    rotation: Tensor | None,
    wp: Tensor | None,
    bias: Tensor | None,
    spec: str,
    smooth: Tensor | None = None,
    wpscale: Tensor | None = None,
) -> Tensor:
    """Return y [..., N] of x [..., D]; tensors as :class:`.buffers.Packed` describes them.

    Exported graphs know the order of the arguments.
    """
    known = spec_from_key(spec)
    flat = x.reshape(-1, known.in_features)
    outputs = wscale.shape[0]
    if flat.shape[0] == 0:
        return x.new_empty((*x.shape[:-1], outputs))
    plan = choose(capability(x.device), flat.shape[0], outputs, known, x.dtype)
    packed = Packed(qweight, wscale, wglobal, basis, rotation, smooth, wp, wpscale, bias)
    y = engine.linear(plan, flat, packed, known)
    return y.view(*x.shape[:-1], outputs)


@quant_linear.register_fake
def _(x: Tensor, qweight: Tensor, wscale: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], wscale.shape[0]))
