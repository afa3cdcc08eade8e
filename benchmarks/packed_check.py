"""What a packed model of full size is held to: it loads, it is finite, its layers are right."""

from typing import Any

import diffusers
import torch
import zarr
from torch.nn.functional import linear

import dirotq  # noqa: F401 (diffusers has to know the format)
from dirotq.device import compute_dtype
from dirotq.kernels.linear import QuantLinear
from dirotq.models.call import load_probe
from dirotq.models.skeleton import move_buffers
from dirotq.pipeline.artifact import Artifact
from dirotq.quantize.plan import read_plan
from dirotq.quantize.tensors import read_array
from dirotq.quiet import quiet
from dirotq.sources.model import DiffusersModel
from dirotq.stages.fuse import relative_error

SAMPLED = 8


def check(model: DiffusersModel, artifacts: dict[str, Artifact], device: torch.device) -> str:
    """Errors of sampled layers on this device and on the CPU's reference path, and of one call."""
    folder = artifacts["pack"].data / "model" / "transformer"
    cls = getattr(diffusers, model.family.transformer)
    dtype = compute_dtype(device)
    with quiet():
        packed = cls.from_pretrained(folder, dtype=dtype).to(device).eval()
    lines = ["| site | error here | error of the CPU reference | apart |\n|---|---|---|---|"]
    rows = zarr.open_group(artifacts["capture"].data / "rows.zarr", mode="r")
    plan = [e for e in read_plan(artifacts["rank"].file("plan.json")) if e.site.kind == "block"]
    weights = model.weights()
    for entry in plan[:: max(len(plan) // SAMPLED, 1)]:
        name = entry.site.name
        x = read_array(rows, name).float()
        want = linear(x, *weights.stacked(entry.site))
        module = packed.get_submodule(name)
        reference = QuantLinear(module.spec, bias=module.bias is not None)
        reference.load_state_dict({k: v.cpu() for k, v in module.state_dict().items()})
        specified = reference(x)
        got = module(x.to(device, dtype)).float().cpu()
        errors = (relative_error(got, want), relative_error(specified, want))
        apart = relative_error(got, specified)
        lines.append(f"| {name} | {errors[0]:.5f} | {errors[1]:.5f} | {apart:.5f} |")
    call = load_probe(artifacts["capture"])[0].on(device)
    with torch.no_grad():
        got = _output(packed, call)
        del packed
        original = model.skeleton()
        weights.fill(original, list(original.state_dict()), device, dtype)
        move_buffers(original, device)
        want = _output(original, call)
    lines.append(
        f"\nOne recorded call through the packed model: finite {bool(got.isfinite().all())}, "
        f"relative error against bf16 {relative_error(got, want):.4f}"
    )
    return "\n".join(lines)


def _output(transformer: Any, call: Any) -> torch.Tensor:
    return transformer(*call.args, **call.kwargs, return_dict=False)[0].float()
