"""SD3's blocks, fused: one read of each q, k and v, norms and GELU inside of the linears' kernels,
modulators of all blocks together, q and k normalized in one pass (3.5).

Letters: B images, T tokens, S text tokens, D channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    RMSNorm,
    SD35AdaLayerNormZeroX,
)
from torch import Tensor

from dirotq.kernels.attention import attention
from dirotq.kernels.gated_residual import gated_residual, gated_residual_norm
from dirotq.kernels.prologue import modulated_norm, plain
from dirotq.kernels.qk_norm_rope import Part, qk_norm_rope

from .accelerate import Modulators, read
from .fused_block import (
    fed_forward,
    heads_of,
    install,
    may_fuse,
    plain_attention,
    plain_feed_forward,
    plain_norm,
)

Heads = tuple[Tensor, Tensor, Tensor]


def fuse_blocks(transformer: Any) -> None:
    """Give each block of an ``SD3Transformer2DModel`` its fused forward, in place.

    The sites must have been swapped before. A block whose q, k and v were not keeps its forward.
    """
    blocks = [block for block in transformer.transformer_blocks if _shares(block)]
    linears = [norm.linear for block in blocks for norm in (block.norm1, block.norm1_context)]
    install(transformer, [(blocks, _forward)], Modulators(blocks, linears))


def _shares(block: Any) -> bool:
    dual = block.attn2 is None or hasattr(block.attn2, "qkv")
    return dual and hasattr(block.attn, "qkv") and hasattr(block.attn, "add_qkv")


def _forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """``JointTransformerBlock.forward``.

    hidden_states [B, T, D], encoder_hidden_states [B, S, D], temb [B, D]
    returns the new encoder_hidden_states, None from the last block, and hidden_states
    """
    x, text = hidden_states, encoder_hidden_states
    if joint_attention_kwargs or not _fusable(self, x, text, temb):
        return self._dirotq_unfused(
            self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
        )
    of_x = self._dirotq_shared.modulators.of(self.norm1.linear, temb)
    shift, scale, gate, *of_ff = of_x.chunk(9 if self.use_dual_attention else 6, dim=1)
    of_text = self._dirotq_shared.modulators.of(self.norm1_context.linear, temb)
    if self.context_pre_only:
        text_scale, text_shift = of_text.chunk(2, dim=1)
    else:
        text_shift, text_scale, text_gate, *of_text_ff = of_text.chunk(6, dim=1)
    attn, eps = self.attn, self.norm1.norm.eps
    qkv = read(attn.qkv, modulated_norm(x, scale, shift, eps=eps))
    text_prologue = modulated_norm(text, text_scale, text_shift, eps=self.norm1_context.norm.eps)
    q, k, v = _normed(attn, qkv, read(attn.add_qkv, text_prologue))
    tokens = x.shape[1]
    if self.context_pre_only:
        q = q[:, :tokens]  # nobody reads what the text would attend to
    mode = self._dirotq_shared.runtime.attention
    attended = attention(q, k, v, mode=mode).flatten(2)
    y, out = x, read(attn.to_out[0], plain(attended[:, :tokens]))
    if self.use_dual_attention:
        y = gated_residual(y, gate, out)
        of_ff, (shift, scale, gate) = of_ff[:3], of_ff[3:]
        again = read(self.attn2.qkv, modulated_norm(x, scale, shift, eps=eps))
        alone = attention(*_normed(self.attn2, again), mode=mode).flatten(2)
        out = read(self.attn2.to_out[0], plain(alone))
    y = _residual_and_fed(self.ff, self.norm2, y, gate, out, of_ff)
    if self.context_pre_only:
        return None, y
    out = read(attn.to_add_out, plain(attended[:, tokens:]))
    text = _residual_and_fed(self.ff_context, self.norm2_context, text, text_gate, out, of_text_ff)
    return text, y


def _residual_and_fed(
    ff: Any, norm: Any, x: Tensor, gate: Tensor, y: Tensor, of_ff: Sequence[Tensor]
) -> Tensor:
    """Return x + gate * y and what the MLP behind ``norm`` adds; of_ff: its shift, scale, gate."""
    shift, scale, ff_gate = of_ff
    x, prologue = gated_residual_norm(x, gate, y, scale, shift, eps=norm.eps)
    return gated_residual(x, ff_gate, fed_forward(ff, prologue))


def _normed(attn: Any, qkv_BTC: Tensor, text_BSC: Tensor | None = None) -> Heads:
    """q, k and v of the image's tokens and then the text's, [B, T + S, heads, D / heads] each."""
    if attn.norm_q is None:
        joint = qkv_BTC if text_BSC is None else torch.cat([qkv_BTC, text_BSC], dim=1)
        return heads_of(joint, attn.heads)
    parts = [Part(qkv_BTC=qkv_BTC, q_weight=attn.norm_q.weight, k_weight=attn.norm_k.weight)]
    if text_BSC is not None:
        q_weight, k_weight = attn.norm_added_q.weight, attn.norm_added_k.weight
        parts.append(Part(qkv_BTC=text_BSC, q_weight=q_weight, k_weight=k_weight))
    return qk_norm_rope(parts, None, heads=attn.heads, eps=attn.norm_q.eps)


def _fusable(block: Any, x: Tensor, text: Tensor, temb: Tensor) -> bool:
    """Tell whether the block may run as one: nothing in it differs from what diffusers made."""
    norm1 = SD35AdaLayerNormZeroX if block.use_dual_attention else AdaLayerNormZero
    norm1_context = AdaLayerNormContinuous if block.context_pre_only else AdaLayerNormZero
    attn, attn2 = block.attn, block.attn2
    return (
        may_fuse(block, x)
        and type(block) is JointTransformerBlock
        and block._chunk_size is None
        and x.dtype == text.dtype == temb.dtype
        and _plain_modulated(block.norm1, norm1)
        and _plain_modulated(block.norm1_context, norm1_context)
        and _plain(attn, x, added=True)
        and (attn2 is None or _plain(attn2, x, added=False))
        and plain_norm(block.norm2)
        and plain_feed_forward(block.ff)
        and (
            block.context_pre_only
            or (plain_norm(block.norm2_context) and plain_feed_forward(block.ff_context))
        )
    )


def _plain_modulated(norm: Any, made: Any) -> bool:
    """Tell whether it is such a norm, modulated by the embedding that the block is given."""
    given = getattr(norm, "emb", None) is None
    return type(norm) is made and given and plain_norm(norm.norm)


def _plain(attn: Any, x: Tensor, *, added: bool) -> bool:
    """Tell whether q and k of all tokens are used as they are, or normed as by ``qk_norm_rope``."""
    norms = [attn.norm_q, attn.norm_k]
    norms += [attn.norm_added_q, attn.norm_added_k] if added else []
    normed = all(norm is None for norm in norms) or all(
        type(norm) is RMSNorm
        and norm.weight is not None
        and norm.bias is None
        and norm.eps == norms[0].eps
        and (norm.weight.device, norm.weight.dtype) == (x.device, x.dtype)
        for norm in norms
    )
    return normed and plain_attention(attn, JointAttnProcessor2_0)
