"""Tokenizers of the tiny pipelines, trained in memory on a handful of captions."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import tiny_line
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from dirotq.assets import tiny_flux

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
LONG_CAPTION = "a large red circle at the top left and two small blue stars at the bottom right"
"""Prompts of different lengths: the families that mask or pad their text have to do so."""


@functools.cache
def clip_and_t5() -> tuple[Any, Any]:
    return tiny_flux.train_tokenizers((*tiny_line.CAPTIONS, LONG_CAPTION))


def qwen_tokenizer(corpus: Sequence[str] = (LONG_CAPTION,)) -> Any:
    """Byte pairs; whole words of the corpus become tokens."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator(
        (*tiny_line.CAPTIONS, *corpus),
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False),
    )
    learned = json.loads(pairs.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def gemma_tokenizer() -> Any:
    _, t5 = clip_and_t5()
    pieces = [p for p in t5.get_vocab() if p not in ("<pad>", "</s>", "<unk>")]
    vocab = {p: i for i, p in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *sorted(pieces)])}
    return transformers.GemmaTokenizer(vocab=vocab, merges=[], padding_side="right")
