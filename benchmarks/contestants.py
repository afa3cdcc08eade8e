"""Transformers of full size, loaded or drawn at random, and the rivals' ways to run them."""

import gc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from dirotq.benchmarks import full_size
from dirotq.benchmarks.bits import method
from dirotq.benchmarks.rivals import Fp8Linear, by_torchao
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.linear import QuantLinear
from dirotq.models.families import family_of
from dirotq.models.family import ModelFamily, Site
from dirotq.models.skeleton import assign, empty_transformer, move_buffers
from dirotq.packed.swap import swap_sites
from dirotq.quantizer import DirotqConfig, mark_packed
from dirotq.quiet import quiet
from dirotq.sources.weights import Weights
from dirotq.tuning.random_linear import random_linear

RANK = 64


def loaded(model: str, folder: Path, device: str = "cuda") -> Any:
    """Load the transformer of a packed pipeline's folder in bf16, as diffusers loads it."""
    cls = getattr(diffusers, full_size.ARCHITECTURES[model][0])
    with quiet():
        transformer = cls.from_pretrained(
            folder / "transformer", dtype=torch.bfloat16, use_safetensors=True
        )
    return transformer.to(device).eval()


def loaded_bf16(model: str, folder: Path, device: str = "cuda") -> Any:
    """Load the original transformer of a pipeline's folder, 24 GB straight to the device."""
    cls = getattr(diffusers, full_size.ARCHITECTURES[model][0])
    config = cls.load_config(folder / "transformer", local_files_only=True)
    transformer = empty_transformer(config, cls)
    names = list(transformer.state_dict())
    Weights(folder / "transformer").fill(transformer, names, torch.device(device), torch.bfloat16)
    move_buffers(transformer, torch.device(device))
    return transformer


def random_bf16(model: str, device: str = "cuda", **changes: Any) -> Any:
    """Make a bf16 transformer of full size with random weights, made on the device.

    changes  fields of its config to replace
    """
    transformer = _skeleton(model, changes)
    _fill(transformer, torch.device(device))
    return transformer


def random_packed(
    model: str, device: str = "cuda", *, preset: str = "dirotq", rank: int = RANK, **changes: Any
) -> Any:
    """Make a packed transformer of full size with random codes, by a method's plan (conf/method).

    No calibration: the same shapes and kernels as a packed folder in seconds, and no meaning.
    """
    transformer = _skeleton(model, changes)
    family = family_of(type(transformer).__name__)
    specs = planned(family, transformer, preset, rank)
    swap_sites(transformer, specs, lambda site: _linear(site, specs[site], device))
    _fill(transformer, torch.device(device))
    mark_packed(transformer, DirotqConfig.of(specs.items()))
    return transformer


def planned(
    family: ModelFamily, transformer: nn.Module, preset: str, rank: int
) -> dict[Site, QuantSpec]:
    """Return the sites that a method packs and their formats, all of one rank."""
    chosen = method(preset)
    specs = ((site, chosen.spec(site, rank)) for site in family.sites(transformer))
    return {site: spec for site, spec in specs if spec is not None}


def compile_blocks(transformer: Any) -> Any:
    """Compile each repeated block, statically: what diffusers recommends. In place.

    Blocks of one class share their code, so a shape is compiled once per class.
    """
    for name in ("recompile_limit", "cache_size_limit"):  # one shape after another; older torch
        if hasattr(torch._dynamo.config, name):
            setattr(torch._dynamo.config, name, 64)
    for block in blocks_of(transformer):
        block.compile(dynamic=False)
    return transformer


def uncompiled(transformer: Any) -> Any:
    """Undo :func:`compile_blocks`, and let go of what was compiled."""
    for block in blocks_of(transformer):
        block._compiled_call_impl = None
    torch.compiler.reset()
    return transformer


def fp8_blocks(transformer: Any) -> Any:
    """Put the linears that we pack into FP8 with per-row scales, by torchao if it is there.

    Modulators stay in bf16, as the usual recipe's filter leaves them.
    """
    names = _in_blocks(transformer)
    if find_spec("torchao"):
        by_torchao(transformer, frozenset(names))
        return transformer
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = transformer.get_submodule(name)
        setattr(transformer.get_submodule(parent), leaf, Fp8Linear.of(linear))
    return transformer


def linears_in_blocks(model: str, changes: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return inputs and outputs of the linears that are packed, modulators left out, by name."""
    return _in_blocks(_skeleton(model, changes, buffers=False))


def blocks_of(transformer: Any) -> list[nn.Module]:
    """Return every repeated block, in order."""
    lists = [m for m in transformer.children() if isinstance(m, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def weight_bytes(transformer: nn.Module) -> int:
    """Count bytes of parameters and buffers at rest; tensors that share memory count once."""
    tensors = [*transformer.parameters(), *transformer.buffers()]
    parts = [part for tensor in tensors for part in _parts(tensor)]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in parts}.values())


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return what a tensor is made of: torchao's claim to be bf16, and hold codes and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [
        part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))
    ]


def free() -> None:
    """Give back what dropped transformers, graphs and compiled code held."""
    torch.compiler.reset()
    collect()


def collect() -> None:
    """Give back the memory of what is dropped; compiled code stays."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned memory of group offloading


def _skeleton(model: str, changes: dict[str, Any], *, buffers: bool = True) -> Any:
    cls, config = full_size.ARCHITECTURES[model]
    return empty_transformer(config | changes, getattr(diffusers, cls), buffers=buffers)


def _in_blocks(transformer: Any) -> dict[str, tuple[int, int]]:
    sites = family_of(type(transformer).__name__).sites(transformer)
    return {
        name: (site.in_features, outputs)
        for site in sites
        if site.kind == "block" and not site.pointwise
        for name, outputs in zip(site.linears, site.out_features, strict=True)
    }


def _linear(site: Site, spec: QuantSpec, device: str) -> QuantLinear:
    """Draw random codes whose outputs are as large as their inputs."""
    linear = random_linear(spec, device=device)
    small = spec.width**-0.5
    linear.wscale.mul_(15 * small)  # codes in -7 ... 7 times 0.015: 0.06, become about one
    if linear.wp is not None:
        linear.wp.mul_(3 * small)
    linear.bias = linear.bias.mul_(0.02) if site.bias and linear.bias is not None else None
    return linear


def _fill(transformer: Any, device: torch.device) -> None:
    """Draw values for every parameter that has no memory yet; move buffers."""
    generator = torch.Generator(device).manual_seed(0)
    for module in transformer.modules():
        if isinstance(module, QuantLinear):
            continue
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            value = torch.empty(parameter.shape, device=device, dtype=torch.bfloat16)
            if value.ndim > 1:
                value.normal_(0, value[0].numel() ** -0.5, generator=generator)
            elif name == "weight":
                value.fill_(1)
            else:
                value.normal_(0, 0.02, generator=generator)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    move_buffers(transformer, device)
    _to_bf16(transformer)
    transformer.eval()


def _to_bf16(transformer: Any) -> None:
    """Cast as ``from_pretrained`` does: not what its class keeps in float32, nor what no file
    holds."""
    whole = set(transformer._keep_in_fp32_modules or ())
    stored = set(transformer.state_dict())
    kept = {n: b for n, b in transformer.named_buffers() if n not in stored}
    with quiet():  # diffusers warns of what is put right below
        transformer.to(torch.bfloat16)
    for name, buffer in kept.items():
        assign(transformer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], buffer)
    for name, parameter in transformer.named_parameters():
        if whole.intersection(name.split(".")):
            parameter.data = parameter.data.float()
