"""A tiny packed transformer of every family and of a class that none describes, and every way in
which accelerate and diffusers bring a transformer's weights in for the time of a call.

A CPU is where the weights lie and where they are computed with, so a hook that does not run would
go unseen: what group offloading takes away is filled with bytes that spoil every result.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from diffusers.hooks import apply_group_offloading, group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from tiny_families import HEADS, TINY, randomize
from tiny_packed import packed
from tiny_spec import tiny_spec
from torch import Tensor, nn

from dirotq.kernels.linear import QuantLinear
from dirotq.models.call import Call
from dirotq.models.discovery import discover
from dirotq.models.families import known_family
from dirotq.packed.swap import swap_sites

NETWORKS = (
    *("flux", "flux2", "pixart", "sana", "sd3", "qwen_image", "z_image", "wan"),
    "discovered",
)
"""Every way in which a block may be built; families that came later repeat them."""
CPU = torch.device("cpu")


def original(name: str) -> Any:
    changes = {"guidance_embeds": True} if name == "flux" else {}
    return _discovered() if name == "discovered" else TINY[name].build(**changes)


def inputs(name: str) -> dict[str, Any]:
    if name != "discovered":
        return TINY[name].inputs()
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 12, 4, generator=draw),
        "encoder_hidden_states": torch.randn(2, 5, 64, generator=draw),
        "timestep": torch.tensor([300, 700]),
        "encoder_attention_mask": torch.ones(2, 5),
        "num_frames": 1,
        "height": 3,
        "width": 4,
    }


def network(name: str) -> Any:
    """Every site packed, with random content; the last packed linear has a dense rotation."""
    made = original(name)
    family = known_family(type(made).__name__)
    sites = family.sites(made) if family else discover(made, (), inputs(name)).sites

    def build(site: Any) -> QuantLinear:
        special = {"rank": 16, "transform": "dense"} if site is sites[-1] else {"rank": 8}
        linear = packed(
            tiny_spec(dim=site.in_features, rows=site.out_features, **special), bias=site.bias
        )
        linear.wscale.mul_(0.1)
        return linear

    swap_sites(made, sites, build)
    return made


def call(made: Any, name: str, device: torch.device = CPU) -> Tensor:
    """One forward in float32, without gradients; the results of all samples in one tensor."""
    given = Call((), inputs(name)).map(lambda tensor: tensor.to(device)).kwargs
    with torch.no_grad():
        result = made(**given, return_dict=False)[0]
    return torch.stack(list(result)) if isinstance(result, list) else result


def sequential(made: nn.Module, folder: Path) -> None:
    """As ``DiffusionPipeline.enable_sequential_cpu_offload`` does it."""
    accelerate.cpu_offload(made, CPU, offload_buffers=len(made._parameters) > 0)


def dispatched(*places: str) -> Callable[..., None]:
    """By a device map that deals the places out to blocks and whatever else the network has."""

    def apply(made: nn.Module, folder: Path) -> None:
        names = [*made._parameters, *made._buffers]
        for name, child in made.named_children():
            inner = len(child) if isinstance(child, nn.ModuleList) else 0
            names += [f"{name}.{i}" for i in range(inner)] or [name]
        device_map = {name: places[i % len(places)] for i, name in enumerate(names)}
        accelerate.dispatch_model(made, device_map, offload_dir=folder, force_hooks=True)

    return apply


def group(kind: str, *, blocks: int | None = None, disk: bool = False) -> Callable[..., None]:
    def apply(made: nn.Module, folder: Path) -> None:
        apply_group_offloading(
            made, CPU, CPU, kind, blocks, offload_to_disk_path=str(folder) if disk else None
        )

    return apply


KINDS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu_offload": lambda made, _: accelerate.cpu_offload(made, CPU),
    "cpu_offload, buffers": lambda made, _: accelerate.cpu_offload(made, CPU, offload_buffers=True),
    "sequential": sequential,
    "disk_offload": lambda made, folder: accelerate.disk_offload(made, folder, CPU),
    "disk_offload, buffers": lambda made, folder: accelerate.disk_offload(made, folder, CPU, True),
    "model": lambda made, _: accelerate.cpu_offload_with_hook(made, CPU),
    "dispatch, disk": dispatched("disk"),
    "dispatch, cpu": dispatched("cpu"),
    "dispatch, parts": dispatched("disk", "cpu"),
    "blocks": group("block_level", blocks=1),
    "pairs of blocks": group("block_level", blocks=2),
    "blocks, disk": group("block_level", blocks=1, disk=True),
    "leaves": group("leaf_level"),
    "leaves, disk": group("leaf_level", disk=True),
}
ACCELERATE = tuple(kind for kind in KINDS if "blocks" not in kind and "leaves" not in kind)


def remove(made: Any, kind: str) -> None:
    """Take the hooks off, as each library does it."""
    if kind in ACCELERATE:
        accelerate.hooks.remove_hook_from_module(made, recurse=True)
        return
    for module in made.modules():
        group = getattr(module, "_diffusers_hook", None)
        hook = group and group.get_hook(group_offloading._GROUP_OFFLOADING)
        if hook:
            hook.group.onload_()
            group.remove_hook(group_offloading._GROUP_OFFLOADING, recurse=False)


def absent(monkeypatch: Any) -> None:
    """Let nothing lie where group offloading has taken it away, though memory is one."""
    kept: dict[Tensor, Tensor] = {}

    def tensors(self: ModuleGroup) -> list[Tensor]:
        inside = [t for m in self.modules for t in (*m.parameters(), *m.buffers())]
        return [*inside, *self.parameters, *self.buffers]

    def offload(self: ModuleGroup) -> None:
        for tensor in tensors(self):
            if tensor not in kept:
                kept[tensor] = tensor.data
                tensor.data = spoiled(tensor)

    def onload(self: ModuleGroup) -> None:
        for tensor in tensors(self):
            tensor.data = kept.pop(tensor, tensor.data)

    to_disk, from_disk = ModuleGroup._offload_to_disk, ModuleGroup._onload_from_disk

    def offload_to_disk(self: ModuleGroup) -> None:
        to_disk(self)
        for tensor in self.tensor_to_key:
            tensor.data = spoiled(tensor)

    def onload_from_disk(self: ModuleGroup) -> None:
        from_disk(self)
        for tensor in self.tensor_to_key:
            # A file's tensors begin anywhere, and by that a CPU's library chooses how it sums.
            tensor.data = tensor.data.clone()

    monkeypatch.setattr(ModuleGroup, "_offload_to_memory", offload)
    monkeypatch.setattr(ModuleGroup, "_onload_from_memory", onload)
    monkeypatch.setattr(ModuleGroup, "_offload_to_disk", offload_to_disk)
    monkeypatch.setattr(ModuleGroup, "_onload_from_disk", onload_from_disk)


def spoiled(tensor: Tensor) -> Tensor:
    value = float("nan") if tensor.is_floating_point() else 113
    return torch.full_like(tensor.data, value)


def _discovered() -> Any:
    config = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_channels": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = diffusers.LTXVideoTransformer3DModel(**config, **HEADS, cross_attention_dim=64)
        return randomize(made)
