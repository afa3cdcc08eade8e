"""The offline halves of the rotation, merged into the weights, and the proof that this is exact.

Letters: M rows, D channels, N outputs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from dirotq.calibrate.replay import Replay
from dirotq.device import pick_device
from dirotq.errors import ConfigError, NumericalError
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.full_float32 import full_float32
from dirotq.kernels.transform_quantize import transform
from dirotq.models.call import load_probe
from dirotq.models.family import Site
from dirotq.packed.swap import swap_sites
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.stage import untracked
from dirotq.progress import track
from dirotq.quantize import memory
from dirotq.quantize.moments import Captured
from dirotq.quantize.plan import read_plan
from dirotq.quantize.rotation import Rotation, site_rotation
from dirotq.quantize.tensors import save_site
from dirotq.sources.model import DiffusersModel


@dataclass(frozen=True, kw_only=True)
class Fuse:
    """Write what each site holds besides its codes; prove the fused network equals the original.

    ``layer_tolerance``    largest relative error of a site on its sampled rows, in float64
    ``network_tolerance``  largest relative error of the denoiser on the captured call, float32

    Writes ``sites/<site>.safetensors`` with ``basis``, ``rotation``, ``smooth``, ``wp``, ``bias``
    (bfloat16, those that exist; 8-bit ``wp`` as codes with ``wpscale``). The network passes block
    by block (dirotq/calibrate/replay.py), so that one block is in memory at a time. Needs no codes:
    a change of ``gptq`` leaves the proof as it stands.

    Raises NumericalError naming the site, or the network, whose error exceeds its tolerance.
    """

    version: ClassVar[str] = "3"
    needs = memory.fuse

    model: DiffusersModel
    layer_tolerance: float
    network_tolerance: float
    device: str = untracked()

    def __post_init__(self) -> None:
        if min(self.layer_tolerance, self.network_tolerance) <= 0:
            raise ConfigError("fuse.layer_tolerance and fuse.network_tolerance must be positive")

    def run(
        self, out: Path, *, capture: Artifact, basis: Artifact, rank: Artifact
    ) -> Mapping[str, float]:
        device = pick_device(self.device)
        plan, captured = read_plan(rank.file("plan.json")), Captured(capture)
        weights, (probe, *_) = self.model.weights(), load_probe(capture)
        worst = {"layer_error": 0.0, "wp_rounding": 0.0}
        entries = {entry.site: entry for entry in plan}

        def fused(site: Site) -> FusedLinear:
            weight, bias = weights.stacked(site, device)
            rotation = site_rotation(entries[site], basis, device)
            linear = FusedLinear(rotation, weight, bias)
            rows = captured.rows(site).to(device)
            error = prove_layer(site, linear, weight, rows, self.layer_tolerance)
            stored = rotation.stored(linear.protected, bias)
            save_site(out / "sites", site.name, stored)
            worst["layer_error"] = max(worst["layer_error"], error)
            if linear.protected is not None:
                kept = stored["wp"].float() * stored.get("wpscale", linear.protected.new_ones(1))
                rounding = relative_error(kept, linear.protected)
                worst["wp_rounding"] = max(worst["wp_rounding"], rounding)
            return linear

        with full_float32():
            original = Replay.of(self.model, device, torch.float32)
            blocks = len(original.blocks)
            for step in track(original.steps([probe]), "fuse: original", total=blocks):
                step.run()
            (want,) = original.outputs
            del original
            changed = Replay.of(self.model, device, torch.float32)
            swap_sites(changed.transformer, _inside("", entries), fused)
            for step in track(changed.steps([probe]), "fuse", total=blocks):
                inside = _inside(step.block, entries)
                swap_sites(changed.transformer, inside, fused)
                step.run()
                for site in inside:
                    changed.transformer.get_submodule(site.name).to("meta")
            (got,) = changed.outputs
        network = relative_error(got, want)
        if not network <= self.network_tolerance:
            raise NumericalError(
                f"the fused network and the original differ by {network:.2g} (relative) on the "
                f"captured call, more than fuse.network_tolerance={self.network_tolerance:g}"
            )
        return worst | {"network_error": network}


class FusedLinear(nn.Module):
    """A site's wide linear after fusing and before quantizing: y = z W_zᵀ + c Vᵀ + bias."""

    basis: Tensor | None
    rotation: Tensor | None
    smooth: Tensor | None
    main: Tensor
    protected: Tensor | None
    bias: Tensor | None

    def __init__(self, rotation: Rotation, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.spec: QuantSpec = rotation.spec
        main, protected = rotation.weights(weight)
        self.register_buffer("basis", rotation.basis_DR)
        self.register_buffer("rotation", rotation.rotation_DK)
        self.register_buffer("smooth", rotation.smooth_D)
        self.register_buffer("main", main)
        self.register_buffer("protected", protected)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        z, c = transform(x, self.basis, self.rotation, self.spec, self.smooth)
        y = z @ self.main[rows].to(x.dtype).mT
        if c is not None and self.protected is not None:
            y = y + c @ self.protected[rows].to(x.dtype).mT
        return y if self.bias is None else y + self.bias[rows].to(x.dtype)


def prove_layer(
    site: Site, linear: FusedLinear, weight: Tensor, x: Tensor, tolerance: float
) -> float:
    """Return the relative error of a fused linear on rows x, in float64.

    Raises NumericalError naming the site if it exceeds ``tolerance``.
    """
    x = x.double()
    want = x @ weight.double().mT + (0 if linear.bias is None else linear.bias.double())
    error = relative_error(linear(x), want)
    if not error <= tolerance:
        raise NumericalError(
            f"site {site.name}: fused and original outputs differ by {error:.2g} (relative), more "
            f"than fuse.layer_tolerance={tolerance:g}; the basis or the weights "
            "are damaged"
        )
    return error


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖ (Frobenius)."""
    return float((got - want).norm() / want.norm().clamp_min(1e-30))


def _inside(block: str, sites: Iterable[Site]) -> list[Site]:
    return [site for site in sites if site.block == block]
