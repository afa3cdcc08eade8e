"""What packed linears are compared with, each as its users would run it.

Letters: M rows, K inputs, N outputs.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

FP8_MAX = 448.0
Linear = Callable[[Tensor], Tensor]


def bf16(weight_NK: Tensor, bias_N: Tensor) -> Linear:
    """Run cuBLAS, with the bias in its epilogue."""
    return lambda x_MK: nn.functional.linear(x_MK, weight_NK, bias_N)


def fp8_per_row(weight_NK: Tensor, bias_N: Tensor) -> Linear:
    """Weights in FP8 with a scale per output, activations quantized to FP8 per row in every call:
    torchao's scheme ``Float8DynamicActivationFloat8WeightConfig(PerRow())``, by torchao if it is
    installed; else the same arithmetic, quantization compiled by ``torch.compile``."""
    if find_spec("torchao"):
        return _torchao(weight_NK, bias_N)
    codes_NK, scale_N1 = fp8_rows(weight_NK)
    quantize = _compiled()

    def run(x_MK: Tensor) -> Tensor:
        codes_MK, scale_M1 = quantize(x_MK)
        return torch._scaled_mm(
            codes_MK, codes_NK.t(), scale_a=scale_M1, scale_b=scale_N1.t(), bias=bias_N,
            out_dtype=x_MK.dtype, use_fast_accum=True,
        )  # fmt: skip

    return run


def fp8_name() -> str:
    return "FP8 per row (torchao)" if find_spec("torchao") else "FP8 per row (torchao's scheme)"


def fp8_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return float8_e4m3fn [M, K] and float32 scales [M, 1]: x = codes * scale, to rounding."""
    x_MK = x_MK.float()
    scale_M1 = x_MK.abs().amax(1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    codes_MK = (x_MK / scale_M1).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return codes_MK, scale_M1


@functools.cache
def _compiled() -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    compiled = torch.compile(fp8_rows)

    def run(x_MK: Tensor) -> tuple[Tensor, Tensor]:
        # One compilation per width, whatever the rows; a width's reduction is compiled for it.
        if len(x_MK) > 1:
            torch._dynamo.maybe_mark_dynamic(x_MK, 0)
        torch._dynamo.mark_static(x_MK, 1)
        return compiled(x_MK)

    return run


def _torchao(weight_NK: Tensor, bias_N: Tensor) -> Linear:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    n, k = weight_NK.shape
    linear = nn.Linear(k, n, device=weight_NK.device, dtype=weight_NK.dtype).requires_grad_(False)
    linear.weight.copy_(weight_NK)
    linear.bias.copy_(bias_N)
    quantize_(linear, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return torch.compile(linear)


class Fp8Linear(nn.Module):
    """A linear of a network in torchao's scheme, for ``torch.compile`` to fuse what it can.

    The same arithmetic as :func:`fp8_per_row` where torchao is not installed; also with a CPU's
    plain products, for tests.
    """

    def __init__(self, codes_NK: Tensor, scale_N1: Tensor, bias_N: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes_NK)
        self.register_buffer("scale", scale_N1)
        self.register_buffer("bias", bias_N)

    @classmethod
    def of(cls, linear: nn.Module) -> "Fp8Linear":
        weight_NK, bias_N = linear.weight, linear.bias
        return cls(*fp8_rows(weight_NK.detach()), None if bias_N is None else bias_N.detach())

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        x_MK = x.reshape(-1, x.shape[-1])
        codes_MK, scale_M1 = fp8_rows(x_MK)
        if x.device.type == "cuda":
            y_MN = torch._scaled_mm(
                codes_MK, self.codes.t(), scale_a=scale_M1, scale_b=self.scale.t(),
                bias=self.bias, out_dtype=x.dtype, use_fast_accum=True,
            )  # fmt: skip
        else:
            y_MN = codes_MK.float() @ self.codes.float().t() * scale_M1 * self.scale.t()
            y_MN = (y_MN if self.bias is None else y_MN + self.bias).to(x.dtype)
        return y_MN.reshape(*x.shape[:-1], -1)


def by_torchao(network: nn.Module, names: frozenset[str]) -> None:
    """Quantize the named linears of a network by torchao itself, in place."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    quantize_(
        network,
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
        filter_fn=lambda module, name: name in names,
    )
