"""FLUX.1 reads each of its shared sites once: one transform, one quantization, one wide GEMM.

Without this a shared site's wide linear runs once per consumer (q, k, v, ...), each time for that
consumer's rows only. Here attentions read q, k and v through diffusers' own fused path, and single
blocks get a forward that takes their MLP's rows from the same call. The wide linear is handed on in
plain code; nothing is remembered between calls.

Letters: B images, T tokens, D channels, F channels of the MLP.
"""

import types
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
)
from torch import Tensor, nn


def share_sites(transformer: Any) -> None:
    """Let each block of a ``FluxTransformer2DModel`` run its shared wide linears once, in place.

    The sites must have been swapped before (models/swap.py). An attention or block whose sites were
    not swapped keeps its linears, and one that cannot share (``share_double``, ``share_single``)
    still computes the same through its views. Names in the state dict do not change. diffusers'
    ``unfuse_qkv_projections()`` undoes the sharing.
    """
    for block in transformer.transformer_blocks:
        share_double(block.attn)
    for block in transformer.single_transformer_blocks:
        share_single(block)


def share_double(attn: Any) -> None:
    """q, k, v of the image and of the text in one call each, by any processor that honors
    ``fused_projections`` (all of diffusers' for FLUX do; others go on reading the views)."""
    # Fused or not is one switch for both streams.
    if hasattr(attn, "qkv") and hasattr(attn, "add_qkv"):
        attn.to_qkv = WholeSite(attn.qkv)
        attn.to_added_qkv = WholeSite(attn.add_qkv)
        attn.fused_projections = True


def share_single(block: Any) -> None:
    """q, k, v and the MLP's input in one call, as long as the attention is diffusers' plain one."""
    if hasattr(block, "qkv_mlp"):
        block.attn.to_qkv = GivenRows(block.qkv_mlp, slice(0, 3 * block.attn.inner_dim))
        block.attn.fused_projections = True
        # The forward of this object and not a subclass: diffusers finds blocks by their class
        # (caches, `compile_repeated_blocks`, `_no_split_modules`). A deep copy binds its own.
        block.forward = types.MethodType(_single_forward, block)


class WholeSite(nn.Module):
    """All consumers of a site at once: its wide linear under another name, without own state."""

    site: Any

    def __init__(self, site: nn.Module) -> None:
        super().__init__()
        # Not a submodule: the site's tensors appear once in the state dict, under the site's name.
        object.__setattr__(self, "site", site)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., N], the outputs of every consumer side by side."""
        return self.site(x)  # a call, not `rows`: hooks that bring offloaded weights have to run


class GivenRows(nn.Module):
    """q, k, v of a single block's attention: handed in by the block, or computed from the site."""

    site: Any

    def __init__(self, site: nn.Module, rows: slice) -> None:
        super().__init__()
        object.__setattr__(self, "site", site)  # not a submodule, as in WholeSite
        self.output_rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """x [..., 3D] is q, k, v already and returned as it is; x [..., D] -> [..., 3D]."""
        if x.shape[-1] == self.output_rows.stop - self.output_rows.start:
            return x
        return self.site.rows(x, self.output_rows)

    def extra_repr(self) -> str:
        return f"rows {self.output_rows.start}:{self.output_rows.stop} of the site"


def _single_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """``FluxSingleTransformerBlock.forward`` with one read of ``qkv_mlp``.

    hidden_states [B, T image, D], encoder_hidden_states [B, T text, D], temb [B, D]
    returns        the new encoder_hidden_states and hidden_states, same shapes
    """
    if not _takes_qkv(self.attn):
        return FluxSingleTransformerBlock.forward(
            self,
            hidden_states,
            encoder_hidden_states,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
        )
    text_tokens = encoder_hidden_states.shape[1]
    residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    x, gate = self.norm(residual, emb=temb)
    qkv, mlp = self.qkv_mlp(x).split((3 * self.attn.inner_dim, self.mlp_hidden_dim), dim=-1)
    attended = self.attn(
        hidden_states=qkv, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    y = self.proj_out(torch.cat([attended, self.act_mlp(mlp)], dim=-1))
    y = residual + gate.unsqueeze(1) * y
    if y.dtype == torch.float16:
        y = y.clip(-65504, 65504)
    return y[:, :text_tokens], y[:, text_tokens:]


def _takes_qkv(attn: Any) -> bool:
    """Whether the attention needs nothing of its input but q, k and v.

    Another processor, or a hook around the attention (caches, layer skipping: they set ``forward``
    on the object), may read or return the input itself and has to get the real one.
    """
    plain = type(attn.processor) is FluxAttnProcessor and "forward" not in attn.__dict__
    return attn.fused_projections and plain
