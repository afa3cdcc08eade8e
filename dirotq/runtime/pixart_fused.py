"""PixArt's blocks, fused: one read of q, k and v, norms and GELU inside of the linears' kernels.

Letters: B images, T tokens, S text tokens, D channels.
"""

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from dirotq.kernels.attention import attention
from dirotq.kernels.gated_residual import gated_residual
from dirotq.kernels.prologue import modulated_norm, plain

from .accelerate import read
from .fused_block import (
    fed_forward,
    from_table,
    heads_of,
    install,
    may_fuse,
    plain_attention,
    plain_feed_forward,
    plain_norm,
)


def fuse_blocks(transformer: Any) -> None:
    """Give each block of a ``PixArtTransformer2DModel`` its fused forward, in place.

    The sites must have been swapped before. A block whose q, k and v were not keeps its forward.
    """
    blocks = [b for b in transformer.transformer_blocks if hasattr(b.attn1, "qkv")]
    install(transformer, [(blocks, _forward)])


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """``BasicTransformerBlock.forward`` with norm type ``ada_norm_single``.

    hidden_states [B, T, D], encoder_hidden_states [B, S, D], timestep [B, 6 D],
    encoder_attention_mask [B, 1 or T, S] is added to the logits
    returns the new hidden_states, [B, T, D]
    """
    x, text, mask = hidden_states, encoder_hidden_states, encoder_attention_mask
    if (
        attention_mask is not None
        or cross_attention_kwargs
        or text is None
        or timestep is None
        or not (mask is None or _broadcasts(mask, text))
        or not _fusable(self, x, timestep)
    ):
        return self._dirotq_unfused(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            timestep, cross_attention_kwargs, class_labels, added_cond_kwargs,
        )  # fmt: skip
    attn = self.attn1
    shift, scale, gate, *of_ff = from_table(self.scale_shift_table, timestep)
    qkv = read(attn.qkv, modulated_norm(x, scale, shift, eps=self.norm1.eps))
    mode = self._dirotq_shared.runtime.attention
    attended = attention(*heads_of(qkv, attn.heads), mode=mode).flatten(2)
    x = gated_residual(x, gate, read(attn.to_out[0], plain(attended)))
    x = x + _cross_attention(self.attn2, x, text, mask)
    shift, scale, gate = of_ff
    prologue = modulated_norm(x, scale, shift, eps=self.norm2.eps)
    return gated_residual(x, gate, fed_forward(self.ff, prologue))


def _cross_attention(attn: Any, x_BTD: Tensor, text_BSD: Tensor, mask: Tensor | None) -> Tensor:
    """Attend to the text, [B, T, D]. Always exact: with so few keys there is no time to win."""
    projected = read(attn.to_q, plain(x_BTD)), attn.to_k(text_BSD), attn.to_v(text_BSD)
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in projected)
    attended = attention(q, k, v, mask=None if mask is None else mask[:, None]).flatten(2)
    return read(attn.to_out[0], plain(attended))


def _broadcasts(mask: Tensor, text_BSD: Tensor) -> bool:
    """Tell whether it is one mask per image for all heads; diffusers pads or repeats others."""
    return mask.ndim == 3 and (mask.shape[0], mask.shape[2]) == text_BSD.shape[:2]


def _fusable(block: Any, x: Tensor, timestep: Tensor) -> bool:
    """Tell whether the block may run as one: nothing in it differs from what diffusers made."""
    attentions = block.attn1, block.attn2
    return (
        may_fuse(block, x)
        and type(block) is BasicTransformerBlock
        and block.norm_type == "ada_norm_single"
        and block.pos_embed is None
        and not block.only_cross_attention
        and block._chunk_size is None
        and x.ndim == 3
        and x.dtype == timestep.dtype == block.scale_shift_table.dtype
        and all(
            plain_attention(attn, AttnProcessor2_0) and attn.norm_q is None and attn.norm_k is None
            for attn in attentions
        )
        and plain_norm(block.norm1)
        and plain_norm(block.norm2)
        and plain_feed_forward(block.ff)
    )
