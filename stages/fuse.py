"""The offline halves of the rotation, merged into the weights, and the proof that this is exact.

Letters: M rows, D channels, N outputs.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dirotq.calibrate.replay import Replay, Step
from dirotq.device import pick_device
from dirotq.errors import ConfigError, NumericalError
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.full_float32 import full_float32
from dirotq.kernels.transform_quantize import transform
from dirotq.models.call import by_part, load_probe
from dirotq.models.family import Site
from dirotq.packed.swap import swap_sites
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.disk import replacing
from dirotq.pipeline.divided import Make, in_units
from dirotq.pipeline.stage import untracked
from dirotq.pipeline.units import Made, Units
from dirotq.progress import track
from dirotq.quantize import memory
from dirotq.quantize.moments import Captured
from dirotq.quantize.plan import read_plan
from dirotq.quantize.rotation import Rotation, site_rotation
from dirotq.quantize.tensors import load_site, save_site
from dirotq.sources.model import DiffusersModel

ORIGINAL, FUSED = "original", "fused"
"""The network as it was and with fused sites: units of the stage, and what it compares."""


@dataclass(frozen=True, kw_only=True)
class Fuse:
    """Write what each site holds besides its codes; prove the fused network equals the original.

    ``layer_tolerance``    largest relative error of a site on its sampled rows, in float64
    ``network_tolerance``  largest relative error of a denoiser on the captured call, float32

    Writes ``sites/<site>.safetensors`` with ``basis``, ``rotation``, ``smooth``, ``wp``, ``bias``
    (bfloat16, those that exist; 8-bit ``wp`` as codes with ``wpscale``). The network passes block
    by block (dirotq/calibrate/replay.py), so that one block is in memory at a time. Needs no codes:
    a change of ``gptq`` leaves the proof as it stands.

    Raises NumericalError naming the site, or the network, whose error exceeds its tolerance.
    """

    version: ClassVar[str] = "3"
    resumable: ClassVar[bool] = True
    what: ClassVar[str] = "fuse"
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
        return in_units(self, out, {"capture": capture, "basis": basis, "rank": rank})

    def units(self, **_: Artifact) -> list[str]:
        """Name the two passes that are compared; of each, a block needs the one before."""
        return [ORIGINAL, FUSED]

    def maker(
        self, out: Path, _: Sequence[str], *, capture: Artifact, basis: Artifact, rank: Artifact
    ) -> Make:
        device, proof = pick_device(self.device), out / "proof"
        probes = [calls[0] for calls in by_part(load_probe(capture)).values()]

        def make(names: Iterable[str]) -> Iterator[Made]:
            proof.mkdir(exist_ok=True)
            for name in names:
                with full_float32():
                    network, worst = Replay.of(self.model, device, torch.float32), {}
                    steps = track(network.steps(probes), f"fuse: {name}", total=len(network.blocks))
                    if name == ORIGINAL:
                        for step in steps:
                            step.run()
                    else:
                        worst = self._fused(out, network, steps, capture, basis, rank)
                outputs = {
                    f"output{call.part}": output.cpu().contiguous()
                    for call, output in zip(probes, network.outputs, strict=True)
                }
                del network
                found = {k: torch.tensor([v], dtype=torch.float64) for k, v in worst.items()}
                file = proof / f"{name}.safetensors"
                with replacing(file) as scratch:
                    save_file({**outputs, **found}, scratch)
                yield name, [file, *([out / "sites"] if name == FUSED else [])]

        return make

    def _fused(
        self,
        out: Path,
        network: Replay,
        steps: Iterable[Step],
        capture: Artifact,
        basis: Artifact,
        rank: Artifact,
    ) -> dict[str, float]:
        """Fuse and prove every site as the call comes to its block; return the largest errors."""
        device, captured = network.device, Captured(capture)
        weights, worst = self.model.weights(), {"layer_error": 0.0, "wp_rounding": 0.0}
        entries = {entry.site: entry for entry in read_plan(rank.file("plan.json"))}

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

        swap_sites(network.transformer, _inside("", entries), fused)
        for step in steps:
            inside = _inside(step.block, entries)
            swap_sites(network.transformer, inside, fused)
            step.run()
            for site in inside:
                network.transformer.get_submodule(site.name).to("meta")
        return worst

    def merge(self, units: Units, **_: Artifact) -> Mapping[str, float]:
        device, proof = pick_device(self.device), units.out / "proof"
        want, got = (load_site(proof / f"{name}.safetensors", device) for name in (ORIGINAL, FUSED))
        network = 0.0
        for name in [name for name in got if name.startswith("output")]:
            error = relative_error(got.pop(name), want[name])
            if not error <= self.network_tolerance:
                what = name.removeprefix("output") or "network"
                raise NumericalError(
                    f"the fused {what} and the original differ by {error:.2g} (relative) on the "
                    f"captured call, more than fuse.network_tolerance={self.network_tolerance:g}"
                )
            network = max(network, error)
        shutil.rmtree(proof)
        return {name: float(value) for name, value in got.items()} | {"network_error": network}


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
        # Who asks a module for its type is told that of its first tensor; bases are 16-bit.
        self.register_buffer("main", main)
        self.register_buffer("basis", rotation.basis_DR)
        self.register_buffer("rotation", rotation.rotation_DK)
        self.register_buffer("smooth", rotation.smooth_D)
        self.register_buffer("protected", protected)
        self.register_buffer("bias", bias)

    in_features = property(lambda self: self.spec.in_features)
    out_features = property(lambda self: self.main.shape[0])

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
