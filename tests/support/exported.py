"""A reader of exported files, written from the formats' descriptions: plain torch, nothing of ours.

ComfyUI's formats: a layer's JSON is the tensor `comfy_quant`; nibbles are low first, two's
complement; svdquant_w4a4 and awq_w4a16 as comfy-quants' docs/formats say; NVFP4 as ModelOpt (row
major, low nibble first) or as cuBLAS reads it (high nibble first, scales in tiles of 128 x 4).
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()

NATIVE = {
    "double_blocks.0.img_attn.qkv": "transformer_blocks.0.attn.qkv",
    "double_blocks.0.txt_attn.qkv": "transformer_blocks.0.attn.add_qkv",
    "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
    "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.net.0.proj",
    "double_blocks.0.img_mlp.2": "transformer_blocks.0.ff.net.2",
    "double_blocks.0.txt_mlp.0": "transformer_blocks.0.ff_context.net.0.proj",
    "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.net.2",
    "single_blocks.0.linear1": "single_transformer_blocks.0.qkv_mlp",
    "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
}
"""Layers of tiny FLUX in native files: our sites."""
MODULATORS = {
    "double_blocks.0.img_mod.lin": "transformer_blocks.0.norm1.linear",
    "double_blocks.0.txt_mod.lin": "transformer_blocks.0.norm1_context.linear",
    "single_blocks.0.modulation.lin": "single_transformer_blocks.0.norm.linear",
}


class ExportedFile:
    """Tensors and records of a file."""

    def __init__(self, file: Path) -> None:
        with safe_open(file, "pt") as stored:
            self.metadata = stored.metadata()
            self.tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118

    def layer(self, name: str) -> dict[str, Tensor]:
        found = {n.rpartition(".")[2]: t for n, t in self.tensors.items() if _parent(n) == name}
        return {n: t for n, t in found.items() if n != "comfy_quant"}

    def record(self, name: str) -> dict | None:
        stored = self.tensors.get(f"{name}.comfy_quant")
        return None if stored is None else json.loads(stored.numpy().tobytes())

    def layers(self) -> list[str]:
        return sorted({_parent(n) for n in self.tensors if n.endswith(".weight_scale")})

    def linear(self, name: str, x: Tensor) -> Tensor:
        """What a layer makes of x [M, K], in float64."""
        t, record = self.layer(name), self.record(name)
        x = x.double()
        kind = "nvfp4" if record is None else record["format"]
        bias = t["bias"].double() if "bias" in t else 0
        if kind == "convrot_w4a4":
            block = record["convrot_groupsize"]
            z = (x.unflatten(-1, (-1, block)) @ regular(block)).flatten(-2)
            top = 127 if record.get("linear_dtype") == "int8" else 7
            z = rounded(z, z.shape[-1], top)
            return z @ (nibbles(t["weight"]) * t["weight_scale"].double()[:, None]).mT + bias
        if kind == "svdquant_w4a4":
            z = rounded(x / t["smooth_factor"].double(), 64, 7)
            branch = x @ t["proj_down"].double() @ t["proj_up"].double().mT
            return (
                z @ grouped(nibbles(t["weight"]), t["weight_scale"].double().mT).mT + branch + bias
            )
        if kind == "awq_w4a16":
            codes = (nibbles(t["weight"]) % 16) - 8
            size, zeros = record["group_size"], t["weight_zeros"].double().mT
            assert codes.shape[1] // size == zeros.shape[1]
            weight = grouped(codes, t["weight_scale"].double().mT)
            return x @ (weight + zeros.repeat_interleave(size, 1)).mT + bias
        assert kind == "nvfp4"
        return x @ nvfp4_weight(t, tiled=record is not None).mT + bias


def nvfp4_weight(t: dict[str, Tensor], *, tiled: bool) -> Tensor:
    packed = t["weight"].long()
    pair = [packed >> 4, packed & 15] if tiled else [packed & 15, packed >> 4]
    values = E2M1[torch.stack(pair, -1).flatten(-2)]
    scale = t["weight_scale"].float().double()
    if tiled:
        rows, groups = values.shape[0], values.shape[1] // 16
        flat, plain = scale.flatten(), torch.empty(rows, groups, dtype=torch.float64)
        wide = scale.shape[1] // 4
        for r in range(rows):  # the place of a scale, spelled out
            for g in range(groups):
                tile = (r // 128) * wide + g // 4
                plain[r, g] = flat[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + g % 4]
        scale = plain
    return grouped(values, scale) * t["weight_scale_2"].double()


def nibbles(packed: Tensor) -> Tensor:
    """int8 [N, K / 2] -> float64 [N, K] in -8 ... 7."""
    byte = packed.long() & 255
    unsigned = torch.stack([byte & 15, byte >> 4], -1).flatten(-2)
    return torch.where(unsigned > 7, unsigned - 16, unsigned).double()


def grouped(codes: Tensor, scale: Tensor) -> Tensor:
    return codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)


def rounded(z: Tensor, group: int, top: int) -> Tensor:
    parts = z.unflatten(-1, (-1, group))
    step = parts.abs().amax(-1, keepdim=True).clamp_min(1e-10) / top
    return ((parts / step).round().clamp(-top, top) * step).flatten(-2)


def regular(block: int) -> Tensor:
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double()
    matrix = torch.ones(1, 1).double()
    while len(matrix) < block:
        matrix = torch.kron(matrix, four)
    assert len(matrix) == block
    return matrix / block**0.5


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
