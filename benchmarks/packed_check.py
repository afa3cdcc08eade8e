"""What a packed model of full size is held to: it loads, it is finite, its layers are right."""

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
import zarr
from torch.nn.functional import linear

import dirotq  # noqa: F401 (diffusers has to know the format)
from dirotq.device import compute_dtype
from dirotq.kernels.linear import QuantLinear
from dirotq.models.call import Call, by_part, load_probe
from dirotq.models.denoisers import alone, prefix
from dirotq.models.skeleton import move_buffers
from dirotq.pipeline.artifact import Artifact
from dirotq.quantize.plan import SitePlan, read_plan
from dirotq.quantize.tensors import read_array
from dirotq.quiet import quiet
from dirotq.sources.model import DiffusersModel
from dirotq.stages.fuse import relative_error

SAMPLED = 8


def check(model: DiffusersModel, artifacts: dict[str, Artifact], device: torch.device) -> str:
    """Errors of sampled layers on this device and on the CPU's reference path, and of one call.

    Of several denoisers one after the other.
    """
    lines = []
    plan = [e for e in read_plan(artifacts["rank"].file("plan.json")) if e.site.kind == "block"]
    calls = by_part(load_probe(artifacts["capture"]))
    for part, inside in zip(model.parts, model.prefixes, strict=True):
        alike = [entry for entry in plan if entry.site.name.startswith(prefix(inside))]
        lines.append(_check_one(model, part, inside, alike, calls[inside][0], artifacts, device))
    return "\n".join(lines)


def _check_one(
    model: DiffusersModel,
    part: str,
    inside: str,
    plan: Sequence[SitePlan],
    call: Call,
    artifacts: dict[str, Artifact],
    device: torch.device,
) -> str:
    """Check the component ``part``, which is called ``inside`` in the network of all."""
    folder = artifacts["pack"].data / "model" / part
    cls = getattr(diffusers, model.family.transformer)
    dtype = compute_dtype(device)
    lines = ["| site | error here | error of the CPU reference | apart |\n|---|---|---|---|"]
    with quiet():
        packed = cls.from_pretrained(folder, dtype=dtype).to(device).eval()
    rows = zarr.open_group(artifacts["capture"].data / "rows.zarr", mode="r")
    weights = model.weights()
    for entry in plan[:: max(len(plan) // SAMPLED, 1)]:
        name = entry.site.name
        x = read_array(rows, name).float()
        want = linear(x, *weights.stacked(entry.site))
        module = packed.get_submodule(alone(entry.site, inside).name)
        reference = QuantLinear(module.spec, bias=module.bias is not None)
        reference.load_state_dict({k: v.cpu() for k, v in module.state_dict().items()})
        specified = reference(x)
        got = module(x.to(device, dtype)).float().cpu()
        errors = (relative_error(got, want), relative_error(specified, want))
        apart = relative_error(got, specified)
        lines.append(f"| {name} | {errors[0]:.5f} | {errors[1]:.5f} | {apart:.5f} |")
    arrived = call.on(device)
    with torch.no_grad():
        got = _output(packed, arrived)
        del packed
        original = model.skeleton().get_submodule(inside)
        names = list(original.state_dict())
        model.weights_apart()[part].fill(original, names, device, dtype)
        move_buffers(original, device)
        want = _output(original, arrived)
    lines.append(
        f"\nOne recorded call through the packed {part}: finite {bool(got.isfinite().all())}, "
        f"relative error against bf16 {relative_error(got, want):.4f}\n"
    )
    return "\n".join(lines)


def _output(transformer: Any, call: Any) -> torch.Tensor:
    return transformer(*call.args, **call.kwargs, return_dict=False)[0].float()
