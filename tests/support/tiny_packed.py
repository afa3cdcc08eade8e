"""A packed linear with random content."""

import torch

from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.linear import QuantLinear


def packed(spec: QuantSpec, *, bias: bool = True, seed: int = 0) -> QuantLinear:
    """Random codes and scales, an orthonormal basis (and rotation) rounded to bf16."""
    generator = torch.Generator().manual_seed(seed)
    module = QuantLinear(spec, bias=bias)
    shape = (spec.outputs, spec.width)
    codes = torch.randint(-7, 8, shape, generator=generator, dtype=torch.int8)
    vectors = torch.linalg.qr(
        torch.randn(spec.in_features, spec.in_features, generator=generator)
    ).Q
    content = {
        "qweight": pack_int4(codes),
        "wscale": torch.rand(module.wscale.shape, generator=generator) * 0.1 + 0.01,
        "bias": torch.randn(spec.outputs, generator=generator),
        "wp": torch.randn(spec.outputs, spec.rank, generator=generator),
        "basis": vectors[:, spec.in_features - spec.rank :],
        "rotation": vectors[:, : spec.width],
        "smooth": torch.rand(spec.in_features, generator=generator) + 0.5,
    }
    if spec.weights.element == "e2m1":
        content |= {
            "qweight": torch.randint(256, module.qweight.shape, generator=generator),
            "wscale": torch.randint(118, 125, module.wscale.shape, generator=generator),
            "wglobal": torch.tensor([2.0**-10 / 3]),
        }
    for name, tensor in module.named_parameters():
        tensor.copy_(content[name])
    return module
