"""Tokenizers of the tiny pipelines, trained in memory on a handful of captions."""

import functools
from collections.abc import Sequence
from typing import Any

import tiny_line
import transformers

from dirotq.assets import tiny_flux
from dirotq.assets.byte_pairs import byte_pair_tokenizer

LONG_CAPTION = "a large red circle at the top left and two small blue stars at the bottom right"
"""Prompts of different lengths: the families that mask or pad their text have to do so."""

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of messages that are texts, or lists of parts."""


@functools.cache
def clip_and_t5() -> tuple[Any, Any]:
    return tiny_flux.train_tokenizers((*tiny_line.CAPTIONS, LONG_CAPTION))


def qwen_tokenizer(corpus: Sequence[str] = (LONG_CAPTION,)) -> Any:
    return byte_pair_tokenizer((*tiny_line.CAPTIONS, *corpus))


def gemma_tokenizer() -> Any:
    _, t5 = clip_and_t5()
    pieces = [p for p in t5.get_vocab() if p not in ("<pad>", "</s>", "<unk>")]
    vocab = {p: i for i, p in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *sorted(pieces)])}
    return transformers.GemmaTokenizer(vocab=vocab, merges=[], padding_side="right")


def seeing_tokenizer(corpus: Sequence[str] = (LONG_CAPTION,)) -> Any:
    """Qwen's, with the tokens that stand for a picture and a template of its kind of messages."""
    tokenizer = qwen_tokenizer(corpus)
    words = ("vision_start", "image_pad", "video_pad", "vision_end")
    tokenizer.add_tokens([f"<|{word}|>" for word in words], special_tokens=True)
    tokenizer.chat_template = CHAT
    return tokenizer
