"""Packed linears of realistic width in every number format, on the GPU where there is one."""

from typing import Any

import torch
from tiny_spec import FP4, tiny_spec
from torch import Tensor

from dirotq.kernels.formats.hadamard import hadamard_block
from dirotq.kernels.formats.pack_int4 import pack_int4
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.linear import QuantLinear

__all__ = ["DEVICE", "FORMATS", "inputs", "random_linear", "spec_of"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

FORMATS: dict[str, dict[str, Any]] = {
    "pow2": {"rank": 64, "act_scale": "pow2"},
    "pow2-r24-b16": {"rank": 24, "block": 16, "act_scale": "pow2"},
    "rms": {"rank": 64, "act_scale": "rms"},
    "floats": {"rank": 64, "act_bits": 8, "act_scale": "rms"},
    "token": {"rank": 64},
    "token-r0": {},
    "token-rank-beyond-the-kernel": {"rank": 320},
    "weight-groups": {"rank": 64, "weight_scale": "group"},
    "groups": {"rank": 64, "weight_scale": "group", "act_scale": "group"},
    "groups-r0": {"weight_scale": "group", "act_scale": "group"},
    "w4a8": {"rank": 64, "act_bits": 8},
    "w4a8-groups": {"rank": 64, "act_bits": 8, "act_scale": "group"},
    "dense": {"rank": 64, "transform": "dense"},
    "dense-pow2": {"rank": 64, "transform": "dense", "act_scale": "pow2"},
    "w4a16": {"act_bits": 16, "weight_scale": "group", "block": 1},
    "w4a16-protected": {"act_bits": 16, "rank": 64, "weight_scale": "group"},
    "nvfp4": {"rank": 64, "block": 1, **FP4["nvfp4"]},
    "mxfp4": {"rank": 64, **FP4["mxfp4"]},
    "mxfp4-r0": FP4["mxfp4"],
    "nvfp4-w4a16": {"rank": 64, "act_bits": 16, "weight_scale": "nvfp4", "weight_group": 16},
    "mxfp4-w4a16": {"act_bits": 16, "weight_scale": "mxfp4", "weight_group": 32},
    "lm4": {"rank": 64, "act_scale": "rms", "weight_scale": "lm4_channel"},
    "lm4-floats": {"rank": 64, "act_bits": 8, "act_scale": "rms", "weight_scale": "lm4_channel"},
    "lm4-w4a8": {"rank": 64, "act_bits": 8, "weight_scale": "lm4_channel"},
    "lm4-groups": {"rank": 64, "weight_scale": "lm4_group", "act_scale": "group"},
    "lm4-w4a16": {"act_bits": 16, "weight_scale": "lm4_group", "block": 1},
}
"""Fields of the spec that differ from W4A4 with one scale per row."""


def spec_of(name: str, dim: int, outputs: int) -> QuantSpec:
    """Hadamard blocks of up to 256 and groups of up to 64 channels, as ``dim`` allows."""
    changes = {"block": 256, **FORMATS[name]}
    changes["block"] = hadamard_block(dim, changes["block"])
    group = hadamard_block(dim, 64)
    if group < 64:
        channel = {"group": "channel", "lm4_group": "lm4_channel"}
        scale = changes.get("weight_scale", "channel")
        changes["weight_scale"] = channel.get(scale, scale)
    if group < 16 and changes.get("act_scale") in ("pow2", "rms") and "act_bits" not in changes:
        changes["act_scale"] = "token"
    groups = {"act_group": group, "weight_group": group}
    return tiny_spec(dim=dim, rows=(outputs,), **groups | changes)


def random_linear(spec: QuantSpec, *, bias: bool = True) -> QuantLinear:
    """Random codes, scales, bias and protected columns; an orthonormal basis and rotation."""
    torch.manual_seed(spec.in_features)
    module = QuantLinear(spec, bias=bias, device=DEVICE)
    columns = spec.in_features if spec.transform.kind == "dense" else spec.rank
    vectors = torch.linalg.qr(torch.randn(spec.in_features, max(columns, 1), device=DEVICE)).Q
    rest = vectors[:, spec.rank :]
    codes = torch.randint(-7, 8, (spec.outputs, spec.width), device=DEVICE, dtype=torch.int8)
    content = {
        "qweight": pack_int4(codes),
        "wscale": torch.rand(module.wscale.shape, device=DEVICE) * 0.1 + 0.01,
        "bias": torch.randn(spec.outputs, device=DEVICE),
        "wp": torch.randn(spec.outputs, spec.rank, device=DEVICE),
        "basis": vectors[:, : spec.rank],
        "rotation": torch.nn.functional.pad(rest, (0, spec.width - rest.shape[1])),
    }
    if spec.weights.element != "int4":
        content["qweight"] = torch.randint(0, 256, module.qweight.shape, device=DEVICE)
    if spec.weights.element == "e2m1":
        low, high = (0, 127) if spec.weights.scale == "e4m3" else (118, 125)
        content |= {
            "wscale": torch.randint(low, high, module.wscale.shape, device=DEVICE),
            "wglobal": torch.full((1,), 3e-4, device=DEVICE),
        }
    for name, tensor in module.named_parameters():
        tensor.copy_(content[name])
    return module


def inputs(rows: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Gaussian rows, with a few outlier channels as in trained models."""
    torch.manual_seed(rows)
    x = torch.randn(rows, dim, device=DEVICE)
    x[:, ::97] *= 10
    return x.to(dtype)
