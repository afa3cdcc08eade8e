"""FLUX.1 reads each of its shared sites once: one transform, one quantization, one wide GEMM.

Without this a shared site's wide linear runs once per linear of the site (q, k, v, ...), each time
for that one's rows only. Here attentions read q, k and v through diffusers' own fused path, and
single blocks get a forward that takes their MLP's rows from the same call. Nothing is remembered
between calls.

Letters: B images, T tokens, D channels, F channels of the MLP.
"""

import functools
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
)
from torch import Tensor, nn

from dirotq.kernels.linear import SiteView

from .accelerate import clipped
from .as_made import untouched

QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def share_sites(transformer: Any) -> None:
    """Let each block of a ``FluxTransformer2DModel`` run its shared wide linears once, in place.

    An attention or block whose sites were not swapped (dirotq/packed/swap.py) keeps its linears,
    and one that cannot share still computes the same through its views. Names in the state dict do
    not change. diffusers' ``unfuse_qkv_projections()`` undoes the sharing.
    """
    for block in transformer.transformer_blocks:
        _share_double(block.attn)
    for block in transformer.single_transformer_blocks:
        _share_single(block)


def _share_double(attn: Any) -> None:
    """Read q, k, v of the image and of the text in one call each, by any processor that honors
    ``fused_projections`` (all of diffusers' for FLUX do; others go on reading the views)."""
    # Fused or not is one switch for both streams.
    if hasattr(attn, "qkv") and hasattr(attn, "add_qkv"):
        attn.to_qkv = Joined(attn, QKV, attn.qkv)
        attn.to_added_qkv = Joined(attn, ADDED_QKV, attn.add_qkv)
        attn.fused_projections = True


def _share_single(block: Any) -> None:
    """Read q, k, v and the MLP's input in one call, while the attention is diffusers' plain one."""
    if hasattr(block, "qkv_mlp"):
        block.attn.to_qkv = Joined(block.attn, QKV, block.qkv_mlp, given=True)
        block.attn.fused_projections = True
        # The forward of this object and not a subclass: diffusers finds blocks by their class
        # (caches, `compile_repeated_blocks`, `_no_split_modules`). A deep copy binds its own.
        block.forward = functools.partial(_single_forward, block)


class Joined(nn.Module):
    """q, k, v of an attention side by side, where diffusers' fused path looks for them; without
    own state.

    One call of the site while its linears are plain views of it. Once one of them is hooked, or
    another module stands in its place, each is called.

    given  whether the caller may hand in q, k, v already, which are returned as they are
    """

    attn: nn.Module
    site: nn.Module

    def __init__(
        self, attn: nn.Module, names: tuple[str, ...], site: nn.Module, *, given: bool = False
    ) -> None:
        super().__init__()
        # Not submodules: the site's tensors appear once in the state dict, under the site's name.
        object.__setattr__(self, "attn", attn)
        object.__setattr__(self, "site", site)
        self.names, self.given = names, given
        self.output_rows = slice(0, getattr(attn, names[-1]).output_rows.stop)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., N], the outputs of every linear named."""
        if self.given and x.shape[-1] == self.output_rows.stop:
            return x
        linears = [getattr(self.attn, name) for name in self.names]
        if all(_plain_view(linear, self.site) for linear in linears):
            return self.site(x, rows=self.output_rows)
        return torch.cat([linear(x) for linear in linears], dim=-1)

    def extra_repr(self) -> str:
        return f"{', '.join(self.names)} of the site"


def _plain_view(linear: nn.Module, site: nn.Module) -> bool:
    """Tell whether a linear is a view of the site whose calls nobody watches or replaces."""
    return type(linear) is SiteView and linear.site is site and untouched(linear)


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
    if not _takes_qkv(self):
        return FluxSingleTransformerBlock.forward(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb,
            joint_attention_kwargs,
        )  # fmt: skip
    text_tokens = encoder_hidden_states.shape[1]
    residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    x, gate = self.norm(residual, emb=temb)
    qkv, mlp = self.qkv_mlp(x).split((3 * self.attn.inner_dim, self.mlp_hidden_dim), dim=-1)
    attended = self.attn(
        hidden_states=qkv, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    y = self.proj_out(torch.cat([attended, self.act_mlp(mlp)], dim=-1))
    y = clipped(residual + gate.unsqueeze(1) * y)
    return y[:, :text_tokens], y[:, text_tokens:]


def _takes_qkv(block: Any) -> bool:
    """Tell whether the attention needs nothing of its input but q, k and v, and nobody else does.

    Another processor, or a hook around the attention (caches, layer skipping: they set ``forward``
    on the object), may read or return the input itself and has to get the real one.
    """
    attn, site = block.attn, block.qkv_mlp
    return (
        attn.fused_projections
        and type(attn.processor) is FluxAttnProcessor
        and untouched(attn)
        and type(attn.to_qkv) is Joined
        and untouched(attn.to_qkv)
        and all(_plain_view(m, site) for m in (attn.to_q, attn.to_k, attn.to_v, block.proj_mlp))
    )
