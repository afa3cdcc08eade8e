"""LTX-2 (to 2.5): a stream of video and one of sound in each block, which read each other."""

from .family import ModelFamily, SiteRule

BLOCK = "transformer_blocks.*"
QKV, KV = ("to_q", "to_k", "to_v"), ("to_k", "to_v")

LTX2 = ModelFamily(
    name="ltx2",
    transformer="LTX2VideoTransformer3DModel",
    rules=(
        # Modulations for all blocks: of time, of what one stream reads of the other, and its gate.
        SiteRule("*", ("linear",), kind="modulator"),
        SiteRule(f"{BLOCK}.attn1", QKV, "qkv"),
        SiteRule(f"{BLOCK}.audio_attn1", QKV, "qkv"),
        SiteRule(f"{BLOCK}.attn2", ("to_q",)),
        # Of the text, which is short: next to no time, but 11% of the weights.
        SiteRule(f"{BLOCK}.attn2", KV, "kv", kind="modulator", text=True),
        SiteRule(f"{BLOCK}.audio_attn2", ("to_q",)),
        SiteRule(f"{BLOCK}.audio_attn2", KV, "kv", kind="modulator", text=True),
        SiteRule(f"{BLOCK}.audio_to_video_attn", ("to_q",)),
        SiteRule(f"{BLOCK}.audio_to_video_attn", KV, "kv"),
        SiteRule(f"{BLOCK}.video_to_audio_attn", ("to_q",)),
        SiteRule(f"{BLOCK}.video_to_audio_attn", KV, "kv"),
        SiteRule(f"{BLOCK}.*", ("to_out.0",)),
        SiteRule(f"{BLOCK}.*", ("net.0.proj",)),
        SiteRule(f"{BLOCK}.*", ("net.2",)),
    ),
    keep=(
        "proj_in",
        "audio_proj_in",
        "*.linear_1",  # of captions, which 2.3 projects elsewhere
        "*.linear_2",
        "*.emb.timestep_embedder.linear_1",
        "*.emb.timestep_embedder.linear_2",
        f"{BLOCK}.*.to_gate_logits",  # from 2.3 on: a number for each head
        "proj_out",
        "audio_proj_out",
    ),
    call={
        "num_inference_steps": 30,
        "guidance_scale": 3.0,
        "height": 512,
        "width": 768,
        "num_frames": 121,
        "max_sequence_length": 1024,
    },
    mask="encoder_attention_mask",
)
