"""A package in Humming's place: what dirotq calls of it, computed in plain torch on its layouts."""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

STEPS = [0, 1, 8, 9, 16, 17, 24, 25]
"""Outputs whose scales lie side by side, of the first quarter of 32; the next one starts 2 behind
(``transform_humming_weight_scale``)."""


class FakeHumming:
    """``failing``: what compiling raises; ``asked``: (layer, rows) of every kernel compiled.

    ``flat``: whether weights lie as they do by default
    """

    def __init__(self, *, flat: bool = True) -> None:
        self.flat = flat
        self.failing: Exception | None = None
        self.asked: list[tuple[dict[str, Any], int]] = []

    def install(self, monkeypatch: Any, library: Any, version: str = "0.1.20") -> None:
        config = SimpleNamespace(use_flat_weight=self.flat)
        kernel = SimpleNamespace(prepare_kernels=self._made)
        for name, content in {
            "humming.config": {"LayerConfig": lambda **_: config},
            "humming.tune": {"get_heuristics_config": self._tuned},
            "humming.kernel.humming": {"HummingKernel": kernel},
            "humming.ops": {"launch_kernel": launch_kernel},
        }.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(library.metadata, "version", lambda name: version)

    def _tuned(self, layer: dict[str, Any], shape_m: int, device: torch.device) -> dict[str, Any]:
        return {"block_shape": (shape_m, 128, 128)}

    def _made(self, layer: str, compute: None, tuned: str, device: torch.device) -> Tensor:
        if self.failing is not None:
            raise self.failing
        self.asked.append((json.loads(layer), json.loads(tuned)["block_shape"][0]))
        return torch.tensor([0, 1 << 30, len(self.asked), 0])


def codes_of(weight: Tensor) -> Tensor:
    """Return int64 [N, K] of weights, int32 [N, K // 8]: chunks of 32 columns, of all outputs."""
    n, words = weight.shape
    chunks = weight.view(-1, n, 4)[..., None] >> torch.arange(0, 32, 4) & 0xF
    codes = chunks.reshape(words // 4, n, 32).transpose(0, 1).reshape(n, 8 * words).long()
    return torch.where(codes > 7, codes - 16, codes)


def in_order(values: Tensor) -> Tensor:
    """Undo the order of scales and biases, [N]."""
    order = torch.tensor([step + 2 * i for i in range(4) for step in STEPS])
    out = torch.empty_like(values).view(-1, 32)
    out[:, order] = values.view(-1, 32)
    return out.flatten()


def launch_kernel(
    *, configs: Tensor, inputs: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor,
    bias: Tensor | None, outputs: Tensor, locks: Tensor,
) -> Tensor:  # fmt: skip
    """Compute the product, with what its launcher demands and the rounding of its epilogue."""
    (m, k), n = inputs.shape, outputs.shape[1]
    assert configs.dtype == torch.int64 and configs.device.type == "cpu"
    assert inputs.dtype == torch.int8 and inputs.is_contiguous()
    assert weight.dtype == torch.int32 and weight.shape == (n, k // 8)
    assert input_scale.dtype == torch.float32 and input_scale.shape == (m, 1)
    assert weight_scale.dtype == outputs.dtype == torch.bfloat16 and weight_scale.shape == (1, n)
    assert locks.dtype == torch.int32 and len(locks) == 2048 and not locks.any()
    sums = inputs.double() @ codes_of(weight).double().T
    y = (sums * input_scale).bfloat16().double() * in_order(weight_scale[0]).double()
    if bias is not None:
        assert bias.dtype == torch.bfloat16 and bias.shape == (n,)
        y = y + in_order(bias).double()
    return outputs.copy_(y.bfloat16())
