"""What the packed denoisers weigh, and by how much each of their sites is off.

T sampled rows of a site, D channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from dirotq.evaluate.timesteps import RowErrors, by_timestep
from dirotq.models.denoisers import joined, prefix
from dirotq.packed.swap import footprint
from dirotq.quantize.moments import Captured
from dirotq.quantize.plan import SitePlan
from dirotq.sources.model import DiffusersModel
from dirotq.sources.weights import Weights


def describe(
    model: DiffusersModel,
    denoisers: Mapping[str, nn.Module],
    plan: list[SitePlan],
    captured: Captured | None,
    device: torch.device,
) -> dict[str, Any]:
    """Return the report's figures of packed denoisers: bytes, bits, and the sites' errors.

    denoisers  by component, in host memory: one site at a time comes to ``device``
    captured   inputs to measure the sites with; None: they are listed alone
    """
    network = joined(denoisers)
    errors: Mapping[str, RowErrors] = {}
    if captured is not None:
        errors = _errors(model.weights(), network, plan, captured, device)
    sites, timesteps = _sites(plan, errors)
    size = footprint(network)
    parameters = sum(p.numel() for p in model.shapes().parameters())
    return {
        "sites": sites,
        "timesteps": timesteps,
        **({"denoisers": _parts(denoisers, sites)} if len(denoisers) > 1 else {}),
        "bytes": size | {"total": sum(size.values()), "original": 2 * parameters},
        "bits_per_parameter": 8 * sum(size.values()) / parameters,
        "parameters": parameters,
    }


def _errors(
    weights: Weights,
    packed: nn.Module,
    plan: list[SitePlan],
    captured: Captured,
    device: torch.device,
) -> dict[str, RowErrors]:
    """Measure the output errors of every site on its sampled rows."""
    errors = {}
    for entry in plan:
        x_TD = captured.rows(entry.site).to(device, torch.float32)
        weight, bias = weights.stacked(entry.site, device)
        want = linear(x_TD, weight, bias)
        module = packed.get_submodule(entry.site.name)
        got = module.to(device)(x_TD)
        module.to("cpu")
        signal_T, noise_T = (p.square().sum(-1).double().cpu() for p in (want, got - want))
        errors[entry.site.name] = RowErrors(signal_T, noise_T, captured.timesteps(entry.site))
    return errors


def _sites(
    plan: list[SitePlan], errors: Mapping[str, RowErrors]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Return the output SQNR of every site, None where it was not measured, with its line of the
    plan; and the timesteps that ``by_timestep`` of each site is for.
    """
    timesteps, columns = by_timestep(errors)
    found = [
        {
            "site": entry.site.name,
            "kind": entry.site.kind,
            "dim": entry.site.in_features,
            "outputs": entry.spec.outputs,
            "rank": entry.spec.rank,
            "format": entry.spec.format,
            "sqnr_db": errors[entry.site.name].sqnr_db if errors else None,
            "by_timestep": columns.get(entry.site.name, []),
            "why": entry.why,
        }
        for entry in plan
    ]
    return found, timesteps


def _parts(denoisers: Mapping[str, nn.Module], sites: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up each denoiser of several: its bytes, and its block sites' mean output SQNR in dB."""
    found = {}
    for part, denoiser in denoisers.items():
        inside = [s for s in sites if s["site"].startswith(prefix(part)) and s["kind"] == "block"]
        known = [s["sqnr_db"] for s in inside if s["sqnr_db"] is not None]
        sqnr = sum(known) / len(known) if known else None
        found[part] = {"bytes": sum(footprint(denoiser).values()), "sqnr_db": sqnr}
    return found
