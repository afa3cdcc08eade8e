"""SANA's blocks, fused: one read of q, k and v, norms inside of the linears' kernels.

Attention to the text runs as diffusers' module: of it only ``to_q`` and ``to_out`` are packed, and
they read what no norm or activation stands before.

Letters: B images, T tokens, D channels.
"""

from typing import Any

from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import GLUMBConv, SanaTransformerBlock
from torch import Tensor
from torch.nn.functional import pad

from dirotq.kernels.gated_residual import gated_residual
from dirotq.kernels.prologue import Prologue, modulated_norm, plain

from .accelerate import clipped, read
from .fused_block import from_table, install, may_fuse, plain_attention, plain_norm


def fuse_blocks(transformer: Any) -> None:
    """Give each block of a ``SanaTransformer2DModel`` its fused forward, in place.

    The sites must have been swapped before. A block keeps its forward if its q, k and v or its
    first convolution were not.
    """
    blocks = [
        block
        for block in transformer.transformer_blocks
        if hasattr(block.attn1, "qkv") and hasattr(block.ff, "inverted")
    ]
    install(transformer, [(blocks, _forward)])


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Any = None,
    height: Any = None,
    width: Any = None,
) -> Tensor:
    """``SanaTransformerBlock.forward``; like it, blind to ``attention_mask``.

    hidden_states [B, T = height * width, D], timestep [B, 6 D]
    returns the new hidden_states, [B, T, D]
    """
    if not _fusable(self, hidden_states, timestep):
        return self._dirotq_unfused(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            timestep, height, width,
        )  # fmt: skip
    x, attn = hidden_states, self.attn1
    shift, scale, gate, *of_ff = from_table(self.scale_shift_table, timestep)
    q, k, v = read(attn.qkv, modulated_norm(x, scale, shift, eps=self.norm1.eps)).chunk(3, dim=-1)
    attended = _linear_attention(attn, q, k, v)
    x = gated_residual(x, gate, clipped(read(attn.to_out[0], plain(attended))))
    x = x + self.attn2(
        x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
    )
    shift, scale, gate = of_ff
    prologue = modulated_norm(x, scale, shift, eps=self.norm2.eps)
    return gated_residual(x, gate, _convolved(self.ff, prologue, height, width))


def _linear_attention(attn: Any, q_BTD: Tensor, k_BTD: Tensor, v_BTD: Tensor) -> Tensor:
    """relu(q) (relu(k)ᵀ v) over its sum of weights, head by head, [B, T, D].

    The arithmetic of ``SanaLinearAttnProcessor2_0``, products in float32.
    """
    q_BTD = q_BTD if attn.norm_q is None else attn.norm_q(q_BTD)
    k_BTD = k_BTD if attn.norm_k is None else attn.norm_k(k_BTD)
    # [B, heads, D / heads, T]
    q, k, v = (t.transpose(1, 2).unflatten(1, (attn.heads, -1)) for t in (q_BTD, k_BTD, v_BTD))
    q, k, v = q.relu().float(), k.relu().float().transpose(2, 3), v.float()
    # A row of ones below v: its product is the sum of weights.
    y = pad(v, (0, 0, 0, 1), value=1.0) @ k @ q
    y = y[:, :, :-1] / (y[:, :, -1:] + 1e-15)
    return y.flatten(1, 2).transpose(1, 2).to(v_BTD.dtype)


def _convolved(ff: Any, prologue: Prologue, height: int, width: int) -> Tensor:
    """``GLUMBConv.forward`` of the prologue's tokens, [B, T, D]."""
    up_BTF = ff.nonlinearity(read(ff.inverted, prologue))
    up = ff.conv_depth(up_BTF.unflatten(1, (height, width)).movedim(-1, 1))
    up, gate = up.chunk(2, dim=1)
    return ff.conv_point(up * ff.nonlinearity(gate)).flatten(2).transpose(1, 2)


def _fusable(block: Any, x: Tensor, timestep: Any) -> bool:
    """Tell whether the block may run as one: nothing in it differs from what diffusers made."""
    ff = block.ff
    return (
        may_fuse(block, x)
        and type(block) is SanaTransformerBlock
        and isinstance(timestep, Tensor)
        and x.dtype == timestep.dtype == block.scale_shift_table.dtype
        and plain_attention(block.attn1, SanaLinearAttnProcessor2_0)
        and plain_norm(block.norm1)
        and plain_norm(block.norm2)
        and type(ff) is GLUMBConv
        and ff.norm is None
        and not ff.residual_connection
    )
