"""The offline halves of the rotation, merged into the weights, and the proof that this is exact.

Letters: M rows, D channels, N outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import zarr
from safetensors.torch import load_file
from torch import Tensor, nn

from dirotq.device import pick_device
from dirotq.errors import ConfigError, NumericalError
from dirotq.kernels.spec import QuantSpec
from dirotq.kernels.transform_quantize import transform
from dirotq.models.source import DiffusersModel, stacked_weight
from dirotq.models.swap import swap_sites
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.stage import untracked
from dirotq.plan import read_plan
from dirotq.progress import track
from dirotq.rotation import Rotation, site_rotation
from dirotq.tensors import read_array, save_site


class FusedLinear(nn.Module):
    """A site's wide linear after fusing and before quantizing: y = z W_zᵀ + c Vᵀ + bias."""

    basis: Tensor | None
    rotation: Tensor | None
    main: Tensor
    protected: Tensor | None
    bias: Tensor | None

    def __init__(self, rotation: Rotation, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.spec: QuantSpec = rotation.spec
        main, protected = rotation.weights(weight)
        self.register_buffer("basis", rotation.basis_DR)
        self.register_buffer("rotation", rotation.rotation_DK)
        self.register_buffer("main", main)
        self.register_buffer("protected", protected)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, slice(None))

    def rows(self, x: Tensor, rows: slice) -> Tensor:
        z, c = transform(x, self.basis, self.rotation, self.spec)
        y = z @ self.main[rows].to(x.dtype).mT
        if c is not None and self.protected is not None:
            y = y + c @ self.protected[rows].to(x.dtype).mT
        return y if self.bias is None else y + self.bias[rows].to(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Fuse:
    """Write what each site holds besides its codes; prove the fused network equals the original.

    ``layer_tolerance``    largest relative error of a site on its sampled rows, in float64
    ``network_tolerance``  largest relative error of the denoiser on the captured call, float32

    Writes ``sites/<site>.safetensors`` with ``basis``, ``rotation``, ``wp``, ``bias`` (bfloat16,
    those that exist). Needs no codes: a change of ``gptq`` leaves the proof as it stands.

    Raises NumericalError naming the site, or the network, whose error exceeds its tolerance.
    """

    version: ClassVar[str] = "1"

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
        plan = read_plan(rank.file("plan.json"))
        rows = zarr.open_group(capture.tree("rows.zarr"), mode="r")
        original = self.model.transformer(torch.float32, device)
        fused: dict[str, FusedLinear] = {}
        worst, rounding = 0.0, 0.0
        for entry in track(plan, "fuse"):
            name = entry.site.name
            weight, bias = stacked_weight(original, entry.site)
            module = FusedLinear(site_rotation(entry, basis, device), weight, bias)
            x = read_array(rows, name).to(device)
            worst = max(worst, self._prove_layer(name, module, weight, bias, x))
            stored = {
                key: tensor.to(torch.bfloat16)
                for key, tensor in (
                    ("basis", module.basis),
                    ("rotation", module.rotation),
                    ("wp", module.protected),
                    ("bias", bias),
                )
                if tensor is not None
            }
            if module.protected is not None:
                rounding = max(rounding, relative_error(stored["wp"].float(), module.protected))
            save_site(out / "sites", name, stored)
            fused[name] = module
        probe = load_file(capture.file("probe.safetensors"), device=str(device))
        network = self._prove_network(original, fused, [e.site for e in plan], probe)
        return {
            "layer_error": worst,
            "network_error": network,
            "wp_rounding": rounding,
        }

    def _prove_layer(
        self, name: str, module: FusedLinear, weight: Tensor, bias: Tensor | None, x: Tensor
    ) -> float:
        x = x.double()
        want = x @ weight.double().mT + (0 if bias is None else bias.double())
        error = relative_error(module(x), want)
        if not error <= self.layer_tolerance:
            raise NumericalError(
                f"site {name}: fused and original outputs differ by {error:.2g} (relative), more "
                f"than fuse.layer_tolerance={self.layer_tolerance:g}; the basis or the weights "
                "are damaged"
            )
        return error

    def _prove_network(
        self, original: nn.Module, fused: dict[str, FusedLinear], sites: list, probe: dict[str, Any]
    ) -> float:
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in probe.items()}
        with torch.no_grad():
            want = original(**inputs, return_dict=False)[0]
            swap_sites(original, sites, lambda site: fused[site.name])
            error = relative_error(original(**inputs, return_dict=False)[0], want)
        if not error <= self.network_tolerance:
            raise NumericalError(
                f"the fused network and the original differ by {error:.2g} (relative) on the "
                f"captured call, more than fuse.network_tolerance={self.network_tolerance:g}"
            )
        return error


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖ (Frobenius)."""
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
