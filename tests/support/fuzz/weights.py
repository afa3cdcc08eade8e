"""LoRAs, single files and headers of safetensors, well-formed ones and others."""

import functools
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save
from tiny_line import build_transformer

from dirotq.sources.lora import add, parse_loras, read_lora
from dirotq.sources.single_file import converted, default_base, looks
from dirotq.sources.weights import read_header, refuse_quantized

from .values import ODD_NUMBERS, VALUES, as_json, damaged, edited

Q = "transformer_blocks.0.attn.to_q"
MODULES = (
    Q, "single_transformer_blocks.0.proj_mlp", "proj_out", "no.such.module", "blocks.99999.q",
    "lora_unet_double_blocks_0_img_attn_proj", "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_single_blocks_0_linear1", "lora_unet_final_layer_linear", "lora_te1_x",
    "diffusion_model.double_blocks.0.img_attn.qkv", "double_blocks.0.processor.proj_lora1", "",
)  # fmt: skip
LEAVES = (
    "lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.other.weight", "alpha",
    "lora_down.weight", "lora_up.weight", "lora.down.weight", "lora.up.weight", "lora_B.bias",
    "diff_b", "dora_scale", "weight",
)  # fmt: skip
SHAPES = ((4, 64), (64, 4), (4, 96), (192, 4), (96, 4), (), (1,), (0, 64), (64, 0), (4, 64, 1, 1))
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool,
    torch.complex64, torch.float8_e4m3fn, torch.int64,
)  # fmt: skip
SETTINGS = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "use_dora": False,
    "alpha_pattern": {".*to_q": 2, "proj_mlp": 1}, "rank_pattern": {"proj_out": 4},
    "init_lora_weights": True, "target_modules": ["to_q"],
}  # fmt: skip


def _tensor(shape: tuple[int, ...], kind: torch.dtype, value: Any) -> torch.Tensor:
    return torch.full(shape, value).to(kind)


TENSORS = st.builds(
    _tensor,
    st.sampled_from(SHAPES),
    st.sampled_from((torch.float32, torch.float32, torch.float32, *DTYPES)),
    st.sampled_from((0.5, 0.5, -2.0, 0.0, 1e30, float("nan"), float("inf"))),
)


@st.composite
def _tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    found = {}
    for module in draw(st.lists(st.sampled_from(MODULES), max_size=3, unique=True)):
        prefix = draw(st.sampled_from(("", "transformer.", "base_model.model.")))
        down, up = draw(st.sampled_from((("lora_A", "lora_B"), ("lora_down", "lora_up"))))
        width, rows = draw(st.sampled_from(((64, 64), (64, 256), (64, 192), (96, 96))))
        found[f"{prefix}{module}.{down}.weight"] = torch.ones(4, width)
        found[f"{prefix}{module}.{up}.weight"] = torch.ones(rows, 4)
        if draw(st.booleans()):
            found[f"{prefix}{module}.alpha"] = torch.tensor(draw(st.sampled_from((2.0, -1.0, 0.0))))
    extra = st.builds("{}.{}".format, st.sampled_from(MODULES), st.sampled_from(LEAVES))
    return found | draw(st.dictionaries(extra, TENSORS, max_size=3))


@functools.cache
def _network() -> tuple[Mapping[str, tuple[int, ...]], str, Mapping[str, torch.Tensor]]:
    """Shapes, config and tensors of the tiny FLUX transformer."""
    network = build_transformer()
    state = {name: t.detach() for name, t in network.state_dict().items()}
    return {name: tuple(t.shape) for name, t in state.items()}, network.to_json_string(), state


LORAS = st.fixed_dictionaries({
    "tensors": _tensors(),
    "settings": st.none() | edited(SETTINGS).map(as_json) | st.text(max_size=9),
    "metadata": st.none() | edited(SETTINGS).map(as_json) | st.text(max_size=9),
    "weight": st.sampled_from((1.0, 1.0, *ODD_NUMBERS, True, "1")),
    "damage": st.booleans(),
})  # fmt: skip


def read_loras(folder: Path, example: dict[str, Any]) -> None:
    shapes, _, state = _network()
    metadata = example["metadata"]
    noted = None if metadata is None else {"lora_adapter_metadata": metadata}
    content = save(example["tensors"], noted)
    file = folder / "a [b] ü.safetensors"
    file.write_bytes(content[: -len(content) // 3] if example["damage"] else content)
    if example["settings"] is not None:
        text = example["settings"].encode(errors="surrogatepass")
        (folder / "adapter_config.json").write_bytes(text)
    for lora in parse_loras([{"path": str(file), "weight": example["weight"]}]):
        lora.identity()
        for module, update in read_lora(lora, shapes, "FluxPipeline").items():
            made = add(state[f"{module}.weight"], [(lora.weight, update)], module)
            assert made.shape == state[f"{module}.weight"].shape


EXTRA = (
    "x", "model.diffusion_model.x", "first_stage_model.x", f"model.diffusion_model.{Q}.weight",
    "double_blocks.0.img_attn.qkv.weight", "double_blocks.7.x", f"{Q}.scale_weight",
)  # fmt: skip
SINGLE = st.fixed_dictionaries({
    "prefix": st.sampled_from(("", "model.diffusion_model.", "transformer.")),
    "without": st.lists(st.integers(0, 30), max_size=2),
    "changed": st.dictionaries(st.integers(0, 30), TENSORS, max_size=2),
    "extra": st.dictionaries(st.sampled_from(EXTRA), TENSORS, max_size=2),
    "config": st.none() | VALUES,
})  # fmt: skip


def read_single_file(folder: Path, example: dict[str, Any]) -> None:
    _, config, state = _network()
    names = sorted(state)
    gone = {names[at % len(names)] for at in example["without"]}
    tensors = {name: tensor for name, tensor in state.items() if name not in gone}
    tensors |= {names[at % len(names)]: tensor for at, tensor in example["changed"].items()}
    made = {example["prefix"] + name: tensor for name, tensor in tensors.items()}
    file = folder / "a [b] ü.safetensors"
    file.write_bytes(save({n: t.clone() for n, t in (made | example["extra"]).items()}))
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(config)
    looks(file)
    found = converted(file, folder / "transformer", str(file))
    assert found.keys() == state.keys()


HEADER = {
    "__metadata__": {"format": "pt"},
    "double_blocks.0.img_attn.qkv.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "transformer_blocks.0.x": {"dtype": "BF16", "shape": [4], "data_offsets": [8, 16]},
}


def _file_of(header: Any) -> bytes:
    text = as_json(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


HEADERS = st.one_of(
    edited(HEADER).map(_file_of),
    edited(HEADER).map(_file_of).flatmap(damaged),
    st.binary(max_size=30),
    st.sampled_from((b"GGUF" + bytes(40), b"PK\3\4" + bytes(40), struct.pack("<Q", 2**63) + b"{}")),
)


def read_headers(folder: Path, content: bytes) -> None:
    file = folder / "x.safetensors"
    file.write_bytes(content)
    refuse_quantized(read_header(file), str(file))
    looks(file)
    default_base(file, str(file))
