"""A site's rotation: cut once from its basis, rounded once to 16 bits, and exact ever after.

Letters: D channels, R protected directions, K main-branch width, N outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dirotq.errors import NumericalError
from dirotq.kernels.formats.protected import dequantize_protected, quantize_protected
from dirotq.kernels.formats.spec import QuantSpec
from dirotq.kernels.transform_quantize import transform
from dirotq.pipeline.artifact import Artifact
from dirotq.quantize.plan import SitePlan
from dirotq.quantize.tensors import load_site, site_file

SEED = 42
"""Seed of the random rotation of the dense form (the released implementation's value)."""


@dataclass(frozen=True)
class Rotation:
    """What the runtime holds for a site, P and T in bf16, and the offline halves that match them.

    The basis is orthonormal only up to bf16. Instead of tolerating the difference, the weights'
    halves are solved for the *rounded* P and T, so that for every x (docs/method.md, Eq. 5-7)

        z W_zᵀ + c Vᵀ = x Wᵀ     with z, c as kernels/transform_quantize computes them.
    """

    spec: QuantSpec
    basis_DR: Tensor | None
    rotation_DK: Tensor | None
    smooth_D: Tensor | None = None
    dual_DR: Tensor | None = None
    """Of ``branch="beside"``: V = W dual."""

    @classmethod
    def cut(cls, found: Mapping[str, Tensor], spec: QuantSpec) -> "Rotation":
        """Take the plan's rank from what ``basis`` found for a site.

        found  ``vectors`` [D, L] ascending (leading direction last), ``duals`` like them for
               ``branch="beside"``, ``smooth`` [D] where the plan smooths; empty where the plan
               needs nothing
        """
        protected = dual = smooth = None
        if spec.rank:
            protected = found["vectors"][:, -spec.rank :].to(torch.bfloat16).contiguous()
            if spec.branch.kind == "beside":
                dual = found["duals"][:, -spec.rank :]
        if spec.transform.smooth:
            smooth = found["smooth"].to(torch.bfloat16)
        if spec.transform.kind != "dense":
            return cls(spec, protected, None, smooth, dual)
        vectors_DD = found["vectors"]
        rest = vectors_DD[:, : spec.in_features - spec.rank].double()
        mixed = rest @ haar(rest.shape[1], SEED).to(rest.device)
        rotation = torch.zeros(
            spec.in_features, spec.width, dtype=torch.bfloat16, device=rest.device
        )
        rotation[:, : rest.shape[1]] = mixed.to(torch.bfloat16)
        return cls(spec, protected, rotation)

    def weights(self, w_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return W_z [N, K] and V [N, R] (None at rank 0), in W's dtype."""
        if self.spec.branch.kind == "beside":
            return self._beside(w_ND)
        basis = None if self.basis_DR is None else self.basis_DR.double()
        if self.rotation_DK is not None:
            both = (w_ND.double() @ self._dual_DD).to(w_ND.dtype)
            kept = self.spec.in_features - self.spec.rank
            main = both.new_zeros(both.shape[0], self.spec.width)
            main[:, :kept] = both[:, :kept]
            return main, both[:, kept:] if basis is not None else None
        if self.smooth_D is not None:
            w_ND = w_ND / self.smooth_D.to(w_ND.dtype)
        main, _ = transform(w_ND, self.basis_DR, None, self._unsmoothed)
        if basis is None:
            return main, None
        gram = basis.mT @ basis
        correction = 2 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - gram
        return main, (w_ND.double() @ basis @ correction).to(w_ND.dtype)

    def moments(self, s_DD: Tensor) -> Tensor:
        """Return S_z = E[zᵀz], float64 [K, K], from S = E[xᵀx], transformed from both sides."""
        p, t = self._exact
        half, _ = transform(s_DD.double(), p, t, self.spec, self.smooth_D)
        half = half.mT.contiguous()  # of 15360 channels each of these is 1.9 GB
        s_KK, _ = transform(half, p, t, self.spec, self.smooth_D)
        del half
        return s_KK.add_(s_KK.mT.clone()).div_(2)

    def stored(self, v_NR: Tensor | None, bias_N: Tensor | None) -> dict[str, Tensor]:
        """Return what a packed linear holds besides its codes, in bfloat16.

        Of ``basis``, ``rotation``, ``smooth``, ``wp`` (V) and ``bias`` those that exist; V in 8
        bits as codes with ``wpscale``.
        """
        held = {
            "basis": self.basis_DR, "rotation": self.rotation_DK, "smooth": self.smooth_D,
            "bias": bias_N, "wp": v_NR,
        }  # fmt: skip
        found = {name: t.to(torch.bfloat16) for name, t in held.items() if t is not None}
        if v_NR is not None and self.spec.branch.bits == 8:
            found["wp"], found["wpscale"] = quantize_protected(v_NR)
        return found

    def _beside(self, w_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """V = W dual as it is stored: the main branch makes up for its rounding (Eq. 12)."""
        kept = None
        if self.dual_DR is not None:
            assert self.basis_DR is not None
            kept = (w_ND.double() @ self.dual_DR.double()).to(torch.bfloat16).to(w_ND.dtype)
            if self.spec.branch.bits == 8:
                kept = dequantize_protected(*quantize_protected(kept)).to(w_ND.dtype)
            product = kept.double() @ self.basis_DR.double().mT
            w_ND = (w_ND.double() - product).to(w_ND.dtype)
        if self.smooth_D is not None:
            w_ND = w_ND / self.smooth_D.to(w_ND.dtype)
        main, _ = transform(w_ND, None, None, self._unsmoothed)
        return main, kept

    @property
    def _unsmoothed(self) -> QuantSpec:
        return replace(self.spec, transform=replace(self.spec.transform, smooth=False))

    @property
    def _exact(self) -> tuple[Tensor | None, Tensor | None]:
        p = None if self.basis_DR is None else self.basis_DR.double()
        return p, None if self.rotation_DK is None else self.rotation_DK.double()

    @cached_property
    def _dual_DD(self) -> Tensor:
        """[T P]⁻ᵀ without T's zero columns: the dual frame, W [T P]⁻ᵀ = [W_z V]."""
        p, t = self._exact
        assert t is not None
        kept = t[:, : self.spec.in_features - self.spec.rank]
        inverse, singular = torch.linalg.inv_ex(kept if p is None else torch.cat([kept, p], 1))
        if singular:
            raise NumericalError("the stored rotation is singular: the basis is damaged")
        return inverse.mT


def site_rotation(entry: SitePlan, basis: Artifact, device: torch.device) -> Rotation:
    """Cut the rotation of a planned site from the ``basis`` artifact."""
    return Rotation.cut(read_basis(entry, basis, device), entry.spec)


def read_basis(entry: SitePlan, basis: Artifact, device: torch.device) -> dict[str, Tensor]:
    """Return what the ``basis`` artifact has of a planned site, as far as it is needed."""
    needed = entry.spec.rank or entry.spec.transform.kind == "dense" or entry.spec.transform.smooth
    file = f"sites/{site_file(entry.site.name)}"
    return load_site(basis.file(file), device) if needed else {}


def haar(dim: int, seed: int) -> Tensor:
    """Draw a random orthogonal matrix, uniform in the Haar measure: float64 [dim, dim]."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gauss)
    # QR alone is not uniform; the signs of R's diagonal make it unique (Mezzadri 2007).
    return q * r.diagonal().sign()
