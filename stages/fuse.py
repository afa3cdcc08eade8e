"""The offline halves of the rotation, merged into the weights, and the proof that this is exact.

Letters: M rows, D channels, N outputs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import zarr
from torch import Tensor, nn

from dirotq.calibrate.replay import Walk
from dirotq.device import pick_device
from dirotq.errors import ConfigError, NumericalError
from dirotq.kernels.full_float32 import full_float32
from dirotq.kernels.spec import QuantSpec
from dirotq.kernels.transform_quantize import transform
from dirotq.models.call import load_probe
from dirotq.packed.swap import swap_sites
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.stage import untracked
from dirotq.progress import track
from dirotq.quantize import memory
from dirotq.quantize.plan import SitePlan, read_plan
from dirotq.quantize.rotation import Rotation, site_rotation
from dirotq.quantize.tensors import read_array, save_site
from dirotq.sources.model import DiffusersModel
from dirotq.sources.weights import Weights


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
        probe, *_ = load_probe(capture)
        worst = {"layer_error": 0.0, "wp_rounding": 0.0}

        def fuse(entry: SitePlan) -> FusedLinear:
            name = entry.site.name
            weight, bias = weights.stacked(entry.site, device)
            rotation = site_rotation(entry, basis, device)
            module = FusedLinear(rotation, weight, bias)
            x = read_array(rows, name).to(device)
            error = self._prove_layer(name, module, weight, bias, x)
            worst["layer_error"] = max(worst["layer_error"], error)
            stored = {
                key: tensor.to(torch.bfloat16)
                for key, tensor in (
                    ("basis", module.basis),
                    ("rotation", module.rotation),
                    ("smooth", module.smooth),
                    ("bias", bias),
                )
                if tensor is not None
            }
            if module.protected is not None:
                wp = rotation.stored(module.protected)
                kept = wp["wp"].float() * wp.get("wpscale", torch.ones(1, device=device)).float()
                rounding = relative_error(kept, module.protected)
                worst["wp_rounding"] = max(worst["wp_rounding"], rounding)
                stored |= wp
            save_site(out / "sites", name, stored)
            return module

        weights = self.model.weights()
        entries = {entry.site: entry for entry in plan}
        blocks = list(dict.fromkeys(e.site.block for e in plan if e.site.block))
        steps = iter(track(range(2 * len(blocks)), "fuse"))

        @contextmanager
        def untouched(block: str, part: nn.Module) -> Iterator[None]:
            yield
            next(steps, None)

        with full_float32():
            walk = self._walk(weights, blocks, device)
            want = walk.run([probe], untouched)[0]
            walk = self._walk(weights, blocks, device)

            @contextmanager
            def swapped(block: str, part: nn.Module | None = None) -> Iterator[None]:
                inside = [site for site in entries if site.block == block]
                swap_sites(walk.transformer, inside, lambda site: fuse(entries[site]))
                yield
                for site in inside:
                    walk.transformer.get_submodule(site.name).to("meta")
                next(steps, None)

            with swapped(""):
                got = walk.run([probe], swapped)[0]
        network = relative_error(got, want)
        if not network <= self.network_tolerance:
            raise NumericalError(
                f"the fused network and the original differ by {network:.2g} (relative) on the "
                f"captured call, more than fuse.network_tolerance={self.network_tolerance:g}"
            )
        return worst | {"network_error": network}

    def needs(self, work: memory.Workload, machine: memory.Machine) -> memory.Needs:
        return memory.fuse(work, machine)

    def _walk(self, weights: Weights, blocks: list[str], device: torch.device) -> Walk:
        transformer = self.model.skeleton()
        return Walk(transformer, weights, blocks, device=device, dtype=torch.float32)

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


def relative_error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖ / ‖want‖ (Frobenius)."""
    return float((got - want).norm() / want.norm().clamp_min(1e-30))
