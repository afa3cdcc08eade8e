"""The shape of tiny-flux: every component of the FluxPipeline, untrained, and how it is saved."""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dirotq.assets.captions import CLIP_LENGTH, T5_LENGTH

GENERATION = {
    "num_inference_steps": 20,
    "guidance_scale": 0.0,
    "height": 128,
    "width": 128,
    "max_sequence_length": T5_LENGTH,
}
T5_WIDTH = 192
_CLIP_WIDTH = 128
LATENT_CHANNELS = 4
MAX_SHARD = "8MB"
_LETTER_SCORE = -20.0  # less likely than any word of the captions
_PRIVATE = 0xE000  # where Unicode leaves characters to whoever wants some


def train_tokenizers(captions: Sequence[str]) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Make CLIP's byte-pair and T5's unigram vocabulary from captions, as FluxPipeline needs.

    The same captions make the same vocabularies in every process.
    """
    vocabulary, merges = _byte_pairs(captions)
    # CLIP pools at the highest id, so its special tokens come last.
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    clip = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CLIP_LENGTH)

    # A unigram vocabulary trained on so few words splits them into letters: give it the words.
    words = Counter(word for caption in captions for word in re.findall(r"[a-z]+", caption))
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", math.log(n / total)) for word, n in words.most_common()]
    known = {piece for piece, _ in pieces}
    letters = ["\u2581", *string.printable.strip()]
    pieces += [(letter, _LETTER_SCORE) for letter in letters if letter not in known]
    return clip, T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _byte_pairs(captions: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learn CLIP's tokens with their ids, and its merges.

    The trainer numbers the last letters of words (``end_of_word_suffix``) in the order of a hash
    map, another one in each process, and ties of merges go by these numbers. Here a last letter is
    a character of its own until the training is over: characters are numbered in their order.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = [word for caption in captions for word, _ in split.pre_tokenize_str(caption)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    ends = {letter: chr(_PRIVATE + ord(letter)) for letter in alphabet}
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pairs.train_from_iterator(
        (word[:-1] + ends[word[-1]] for word in words),
        trainers.BpeTrainer(
            vocab_size=640, special_tokens=[], initial_alphabet=alphabet, show_progress=False
        ),
    )
    learned = json.loads(pairs.to_str())["model"]
    marked = str.maketrans({end: f"{letter}</w>" for letter, end in ends.items()})
    vocabulary = {token.translate(marked): number for token, number in learned["vocab"].items()}
    return vocabulary, [(a.translate(marked), b.translate(marked)) for a, b in learned["merges"]]


def build_autoencoder() -> AutoencoderKL:
    """A convolutional autoencoder, 128 x 128 pixels to 4 x 32 x 32 latents, no attention."""
    return AutoencoderKL(
        sample_size=128,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
        shift_factor=0.0,
        scaling_factor=1.0,  # both measured after training
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """One CLIP text layer; only its pooled output is used."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_CLIP_WIDTH,
            intermediate_size=3 * _CLIP_WIDTH,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=_CLIP_WIDTH,
        )
    )


def build_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """Two T5 encoder layers; FluxPipeline feeds them padded captions without a mask."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=T5_WIDTH,
            d_kv=32,
            d_ff=2 * T5_WIDTH,
            num_layers=2,
            num_heads=6,
            feed_forward_proj="relu",
            dropout_rate=0.0,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer() -> FluxTransformer2DModel:
    """FLUX in small: 2 double and 4 single blocks of width 256, blocks start as the identity."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=_CLIP_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    zeroed = [transformer.proj_out]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    zeroed += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in zeroed:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along the flow, time warped by a constant `shift` (1 = evenly spaced)."""
    return FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=False)


def save_pipeline(
    folder: Path,
    *,
    tokenizers: tuple[CLIPTokenizer, T5Tokenizer],
    autoencoder: AutoencoderKL,
    clip: CLIPTextModel,
    t5: T5EncoderModel,
    transformer: FluxTransformer2DModel,
    shift: float,
) -> None:
    """Write a complete diffusers folder in bfloat16, no file above 8 MB, and generation.json."""
    pipeline = FluxPipeline(
        scheduler=build_scheduler(shift),
        vae=autoencoder,
        text_encoder=clip,
        tokenizer=tokenizers[0],
        text_encoder_2=t5,
        tokenizer_2=tokenizers[1],
        transformer=transformer,
    )
    pipeline.to(torch.bfloat16).save_pretrained(folder, max_shard_size=MAX_SHARD)
    (folder / "generation.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
