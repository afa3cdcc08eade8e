"""The scenes that the diffusion trains on: drawn, captioned and tokenized while other parts train.

N pool.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from dirotq.assets.captions import CLIP_LENGTH, T5_LENGTH, captions_of
from dirotq.assets.color_roles import color_roles
from dirotq.assets.scenes import BACKGROUNDS, KIND, sample_side

_CHUNK = 4096
# The backgrounds that look different when their two colors are swapped.
_ORDERED = [BACKGROUNDS.index(kind) for kind in ("gradient", "dotted")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Training scenes with everything precomputed.

    latents bfloat16 [N, 4, 32, 32]; clip_ids int32 [N, 64]; t5_ids int32 [N, 48]
    roles int8 [N, 48], the `color_roles` of the tokens in t5_ids
    ordered int64 [M], the rows whose background has two colors that cannot be swapped
    """

    latents: Tensor
    clip_ids: Tensor
    t5_ids: Tensor
    roles: Tensor
    ordered: Tensor


def tokenize(
    captions: list[str], tokenizers: tuple[CLIPTokenizer, T5Tokenizer]
) -> tuple[np.ndarray, np.ndarray]:
    """Pad captions the way FluxPipeline does: int32 [n, 64] for CLIP and [n, 48] for T5."""
    lengths = (CLIP_LENGTH, T5_LENGTH)
    clip_ids, t5_ids = (
        tokenizer(captions, padding="max_length", max_length=length, truncation=True).input_ids
        for tokenizer, length in zip(tokenizers, lengths, strict=True)
    )
    return np.asarray(clip_ids, dtype=np.int32), np.asarray(t5_ids, dtype=np.int32)


def _caption_chunk(folder: Path, count: int, seed: int) -> tuple[np.ndarray, ...]:
    """Worker: draw, caption and tokenize one chunk: scenes int64, CLIP ids, T5 ids, roles."""
    torch.set_num_threads(1)
    tokenizers = load_tokenizers(folder)
    scenes = sample_side(count, heldout=False, generator=torch.Generator().manual_seed(seed))
    clip_ids, t5_ids = tokenize(captions_of(scenes, seed), tokenizers)
    return scenes.numpy(), clip_ids, t5_ids, color_roles(scenes.numpy(), t5_ids, tokenizers[1])


def load_tokenizers(folder: Path) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """The two tokenizers of the diffusers pipeline in `folder`."""
    return (
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        T5Tokenizer.from_pretrained(folder / "tokenizer_2"),
    )


@contextmanager
def captions_in_background(
    folder: Path, count: int, seed: int
) -> Iterator[list[Future[tuple[np.ndarray, ...]]]]:
    """Caption and tokenize `count` training scenes in other processes while the GPU works."""
    workers = max(1, (os.cpu_count() or 1) - 3)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as executor:
        sizes = [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]
        yield [
            executor.submit(_caption_chunk, folder, size, seed + i) for i, size in enumerate(sizes)
        ]


def build_pool(
    chunks: list[Future[tuple[np.ndarray, ...]]],
    encode: Callable[[Tensor], Tensor],
    device: torch.device,
) -> Pool:
    """Collect tokenized chunks and compute their latents; `encode` maps scenes to latents."""
    columns: list[list[Tensor]] = []
    for chunk in chunks:
        scenes, *tokens = (torch.from_numpy(array) for array in chunk.result())
        ordered = torch.isin(scenes[:, KIND], torch.tensor(_ORDERED))
        columns.append([encode(scenes), *(x.to(device) for x in (*tokens, ordered))])
    latents, clip_ids, t5_ids, roles, ordered = map(torch.cat, zip(*columns, strict=True))
    return Pool(
        latents=latents,
        clip_ids=clip_ids,
        t5_ids=t5_ids,
        roles=roles,
        ordered=ordered.nonzero().flatten(),
    )
