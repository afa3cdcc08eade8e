"""FLUX.1's blocks, fused: norms, GELU and concatenation are computed by the kernels of the linears
that read them, q and k are normalized and rotated in one pass, residuals are added in one, with the
next norm.

Where it can't (dirotq/runtime/fused_block.py) a block runs module by module
(dirotq/runtime/flux_sharing.py).

Letters: B images, T tokens, D channels.
"""

from collections.abc import Callable
from typing import Any

from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

from dirotq.kernels.attention import attention
from dirotq.kernels.gated_residual import gated_residual_norm
from dirotq.kernels.prologue import concat_gelu, plain
from dirotq.kernels.qk_norm_rope import Part, qk_norm_rope

from .accelerate import Modulators, clipped, joined, read
from .flux_sharing import share_sites
from .fused_block import (
    fed_forward,
    install,
    may_fuse,
    plain_backend,
    plain_feed_forward,
    plain_norm,
)
from .look_ahead import last_residual, norm_ahead

Rope = tuple[Tensor, Tensor] | None


def fuse_blocks(transformer: Any) -> None:
    """Give each block of a ``FluxTransformer2DModel`` its fused forward, in place.

    The sites must have been swapped before. A block whose sites were not keeps its forward.
    """
    share_sites(transformer)  # what a block falls back to
    doubles = [b for b in transformer.transformer_blocks if hasattr(b.attn, "add_qkv")]
    singles = [b for b in transformer.single_transformer_blocks if hasattr(b, "qkv_mlp")]
    linears = [m.linear for b in doubles for m in (b.norm1, b.norm1_context)]
    linears += [b.norm.linear for b in singles]
    modulators = Modulators([*doubles, *singles], linears)
    install(transformer, [(doubles, _double_forward), (singles, _single_forward)], modulators)


def _double_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rope = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """``FluxTransformerBlock.forward``.

    hidden_states [B, T image, D], encoder_hidden_states [B, T text, D], temb [B, D]
    returns        the new encoder_hidden_states and hidden_states, same shapes
    """
    if joint_attention_kwargs or not _double_fusable(self, hidden_states):
        return self._dirotq_unfused(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb,
            joint_attention_kwargs,
        )  # fmt: skip
    attn, shared = self.attn, self._dirotq_shared
    x, text, tokens = hidden_states, encoder_hidden_states, encoder_hidden_states.shape[1]
    of_x = shared.modulators.of(self.norm1.linear, temb).chunk(6, dim=1)
    of_text = shared.modulators.of(self.norm1_context.linear, temb).chunk(6, dim=1)
    prologue = norm_ahead(shared, self.norm1, x, temb, of_x[1], of_x[0])
    text_prologue = norm_ahead(shared, self.norm1_context, text, temb, of_text[1], of_text[0])
    shared.ahead = ()
    qkv, text_qkv = read(attn.qkv, prologue), read(attn.add_qkv, text_prologue)
    q, k, v = qk_norm_rope(
        [
            _part(text_qkv, attn.norm_added_q, attn.norm_added_k),
            _part(qkv, attn.norm_q, attn.norm_k),
        ],
        image_rotary_emb,
        heads=attn.heads,
        eps=attn.norm_q.eps,
    )
    attended = attention(q, k, v, mode=shared.runtime.attention).flatten(2)
    x, prologue = gated_residual_norm(
        x, of_x[2], read(attn.to_out[0], plain(attended[:, tokens:])), of_x[4], of_x[3],
        eps=self.norm2.eps,
    )  # fmt: skip
    text, text_prologue = gated_residual_norm(
        text, of_text[2], read(attn.to_add_out, plain(attended[:, :tokens])), of_text[4],
        of_text[3], eps=self.norm2_context.eps,
    )  # fmt: skip
    after = _after(self, x, _double_fusable)
    norms = (None, None) if after is None else (after.norm1, after.norm1_context)
    fed = fed_forward(self.ff, prologue)
    x, ahead = last_residual(shared, norms[0], x, of_x[5], fed, temb)
    fed = fed_forward(self.ff_context, text_prologue)
    text, text_ahead = last_residual(shared, norms[1], text, of_text[5], fed, temb)
    shared.ahead = (*ahead, *text_ahead)
    return clipped(text), x


def _single_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rope = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """``FluxSingleTransformerBlock.forward``; arguments as in :func:`_double_forward`."""
    if joint_attention_kwargs or not _single_fusable(self, hidden_states):
        return self._dirotq_unfused(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb,
            joint_attention_kwargs,
        )  # fmt: skip
    attn, shared = self.attn, self._dirotq_shared
    tokens = encoder_hidden_states.shape[1]
    x = joined(encoder_hidden_states, hidden_states)
    shift, scale, gate = shared.modulators.of(self.norm.linear, temb).chunk(3, dim=1)
    prologue = norm_ahead(shared, self.norm, x, temb, scale, shift)
    shared.ahead = ()
    wide = read(self.qkv_mlp, prologue)
    q, k, v = qk_norm_rope(
        [_part(wide, attn.norm_q, attn.norm_k)],
        image_rotary_emb,
        heads=attn.heads,
        eps=attn.norm_q.eps,
    )
    attended = attention(q, k, v, mode=shared.runtime.attention).flatten(2)
    behind = wide[..., 3 * attn.inner_dim :]
    y = read(self.proj_out, concat_gelu(attended, behind))
    after = _after(self, x, _single_fusable)
    norm = None if after is None else after.norm
    x, shared.ahead = last_residual(shared, norm, x, gate, y, temb)
    x = clipped(x)
    return x[:, :tokens], x[:, tokens:]


def _after(block: Any, x: Tensor, fusable: Callable[[Any, Tensor], bool]) -> Any | None:
    """Return the block that follows, if it is of the same kind and will run fused too."""
    after = block._dirotq_shared.modulators.after(block)
    return after if type(after) is type(block) and fusable(after, x) else None


def _part(qkv_BTC: Tensor, norm_q: Any, norm_k: Any) -> Part:
    return Part(qkv_BTC=qkv_BTC, q_weight=norm_q.weight, k_weight=norm_k.weight)


def _double_fusable(block: Any, x: Tensor) -> bool:
    """Tell whether the block may run as one: nothing in it differs from what diffusers made."""
    modulated = block.norm1, block.norm1_context
    plain_norms = (*(m.norm for m in modulated), block.norm2, block.norm2_context)
    return (
        _fusable(block, x)
        and all(plain_norm(norm) for norm in plain_norms)
        and plain_feed_forward(block.ff)
        and plain_feed_forward(block.ff_context)
    )


def _single_fusable(block: Any, x: Tensor) -> bool:
    return _fusable(block, x) and plain_norm(block.norm.norm)


def _fusable(block: Any, x: Tensor) -> bool:
    attn = block.attn
    processor = attn.processor
    return (
        may_fuse(block, x)
        and type(processor) is FluxAttnProcessor
        and plain_backend(processor)
        and processor._parallel_config is None
        and attn.fused_projections
        and attn.norm_q.weight.device == x.device  # not so while offloaded part by part
    )
