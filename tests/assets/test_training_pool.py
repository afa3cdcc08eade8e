"""The pool keeps scenes, tokens and roles in step, and knows where color order shows."""

from concurrent.futures import Future
from pathlib import Path

import torch

from dirotq.assets.captions import captions_of
from dirotq.assets.color_roles import color_roles
from dirotq.assets.scenes import BACKGROUNDS, KIND, sample_scenes
from dirotq.assets.tiny_flux import train_tokenizers
from dirotq.assets.training_pool import build_pool, captions_in_background, tokenize


def test_pool_joins_chunks_and_lists_ordered_backgrounds() -> None:
    scenes = sample_scenes(200, torch.Generator().manual_seed(4))
    captions = captions_of(scenes, seed=4)
    tokenizers = train_tokenizers(captions)
    clip_ids, t5_ids = tokenize(captions, tokenizers)
    roles = color_roles(scenes.numpy(), t5_ids, tokenizers[1])
    chunks: list[Future] = [Future(), Future()]
    for chunk, rows in zip(chunks, (slice(0, 150), slice(150, 200)), strict=True):
        chunk.set_result((scenes[rows].numpy(), clip_ids[rows], t5_ids[rows], roles[rows]))
    pool = build_pool(chunks, lambda part: part.bfloat16(), torch.device("cpu"))
    assert torch.equal(pool.latents, scenes.bfloat16())
    assert torch.equal(pool.t5_ids, torch.from_numpy(t5_ids))
    assert torch.equal(pool.roles, torch.from_numpy(roles))
    expected = [
        row
        for row, kind in enumerate(scenes[:, KIND].tolist())
        if BACKGROUNDS[kind] in ("gradient", "dotted")
    ]
    assert pool.ordered.tolist() == expected


def test_workers_draw_and_label(tmp_path: Path) -> None:
    captions = captions_of(sample_scenes(300, torch.Generator().manual_seed(5)), seed=5)
    clip, t5 = train_tokenizers(captions)
    clip.save_pretrained(tmp_path / "tokenizer")
    t5.save_pretrained(tmp_path / "tokenizer_2")
    with captions_in_background(tmp_path, 6, seed=1) as chunks:
        scenes, clip_ids, t5_ids, roles = chunks[0].result()
    assert scenes.shape == (6, 22)
    assert clip_ids.shape == (6, 64)
    assert t5_ids.shape == roles.shape == (6, 48)
    assert ((roles == 1).sum(1) == 1).all()
