"""``torch.ops.dirotq.norm_rope_attention``: queries and keys normed, turned and attended to.

One operator from the linears to the output, so that the step that norms and turns writes FP8 where
attention is computed in it. Where it isn't, this is ``norm_rope`` twice and ``attention``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..fp8_qkv import Codes, attend, reference
from ..norm_rope import codes, norm_rope, why_not_codes
from . import flash3
from .engines import choose, run
from .ops import LIBRARY

LIBRARY.define(
    "norm_rope_attention(Tensor[] q, Tensor?[] q_weights, float? q_eps, Tensor?[] q_cos, "
    "Tensor?[] q_sin, Tensor[] k, Tensor?[] k_weights, float? k_eps, Tensor?[] k_cos, "
    "Tensor?[] k_sin, bool interleaved, Tensor v, float? scale) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)

Parts = Sequence[Tensor]
Some = Sequence[Tensor | None]


def norm_rope_attention(
    q: Parts, q_weights: Some, q_eps: float | None, q_cos: Some, q_sin: Some,
    k: Parts, k_weights: Some, k_eps: float | None, k_cos: Some, k_sin: Some,
    interleaved: bool, v_BHSd: Tensor, scale: float | None,
) -> Tensor:  # fmt: skip
    """Compute attention, mode ``fp8``, of what ``norm_rope`` makes of q and k; without gradients.

    q ... q_sin  arguments of :func:`..norm_rope.norm_rope`, k ... k_sin likewise
    v_BHSd       [B, H, S, d]; ``scale`` as :func:`.engines.run` takes it
    returns      v's dtype, [B, H, T, d] of memory [B, T, H, d]
    """
    queries = q, q_weights, q_eps, q_cos, q_sin, interleaved
    keys = k, k_weights, k_eps, k_cos, k_sin, interleaved
    v_BSHd, head = v_BHSd.transpose(1, 2), v_BHSd.shape[-1]
    engine = choose(_joined(q), _joined(k), None, scale, "fp8")
    fit = not (why_not_codes(q_weights, q_eps, head) or why_not_codes(k_weights, k_eps, head))
    if not fit or engine not in ("flash3 fp8", "fp8 reference"):
        y_BTHd = run(norm_rope(*queries), norm_rope(*keys), v_BSHd, None, scale, "fp8")
        return y_BTHd.contiguous().transpose(1, 2)
    scale = head**-0.5 if scale is None else scale
    v8, v_scale = _values(v_BSHd)  # first: its two passes share the cache
    q8, q_scale = codes(*queries)  # type: ignore[arg-type]
    k8, k_scale = codes(*keys)  # type: ignore[arg-type]
    all_codes = Codes(q8, k8, v8, q_scale, k_scale, v_scale)
    if engine == "flash3 fp8":
        return flash3.fp8(all_codes, scale=scale).transpose(1, 2)
    return attend(all_codes, scale=scale).to(v_BHSd.dtype).transpose(1, 2)


def _joined(parts: Parts) -> Tensor:
    """Stand for the tokens of all parts, of which nobody reads the numbers."""
    batch, _, heads, dim = parts[0].shape
    tokens = sum(part.shape[1] for part in parts)
    return parts[0].new_empty(()).expand(batch, tokens, heads, dim)


def _values(v_BSHd: Tensor) -> tuple[Tensor, Tensor]:
    if not v_BSHd.is_cuda:
        return reference.values(v_BSHd)
    from ..fp8_qkv.kernel import launch_values

    return launch_values(v_BSHd)


def _fake(
    q: Parts, q_weights: Some, q_eps: float | None, q_cos: Some, q_sin: Some,
    k: Parts, k_weights: Some, k_eps: float | None, k_cos: Some, k_sin: Some,
    interleaved: bool, v_BHSd: Tensor, scale: float | None,
) -> Tensor:  # fmt: skip
    b, _, h, d = q[0].shape
    return v_BHSd.new_empty((b, sum(part.shape[1] for part in q), h, d)).transpose(1, 2)


LIBRARY.impl("norm_rope_attention", norm_rope_attention, "CompositeExplicitAutograd")
torch.library.register_fake("dirotq::norm_rope_attention", _fake, lib=LIBRARY)

OPERATOR = torch.ops.dirotq.norm_rope_attention.default
