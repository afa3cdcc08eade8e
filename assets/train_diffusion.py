"""Train tiny-flux's transformer and text encoders together, by flow matching on latents.

B batch, N pool, T = 64 image tokens a side squared (256), C = 16 packed channels.
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
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from dirotq.assets.captions import captions_of
from dirotq.assets.scenes import sample_side
from dirotq.assets.schedule import set_rate, timed_steps
from dirotq.assets.tiny_flux import CLIP_LENGTH, T5_LENGTH, build_clip, build_t5, build_transformer

_CHUNK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Training scenes with everything precomputed.

    latents bfloat16 [N, 4, 32, 32]; clip_ids int32 [N, 64]; t5_ids int32 [N, 48]
    """

    latents: Tensor
    clip_ids: Tensor
    t5_ids: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Denoiser:
    """The three networks that are trained together."""

    transformer: FluxTransformer2DModel
    clip: CLIPTextModel
    t5: T5EncoderModel

    def modules(self) -> tuple[nn.Module, ...]:
        return self.transformer, self.clip, self.t5

    def parameters(self) -> list[Tensor]:
        return [p for module in self.modules() for p in module.parameters()]


def untrained(tokenizers: tuple[CLIPTokenizer, T5Tokenizer]) -> Denoiser:
    """Transformer and text encoders with fresh weights, on the CPU."""
    clip, t5 = build_clip(tokenizers[0]), build_t5(tokenizers[1])
    return Denoiser(transformer=build_transformer(), clip=clip, t5=t5)


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
    """Worker: draw, caption and tokenize one chunk: scenes int64, CLIP ids, T5 ids."""
    torch.set_num_threads(1)
    tokenizers = load_tokenizers(folder)
    scenes = sample_side(count, heldout=False, generator=torch.Generator().manual_seed(seed))
    return scenes.numpy(), *tokenize(captions_of(scenes, seed), tokenizers)


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
    latents, clip_ids, t5_ids = [], [], []
    for chunk in chunks:
        scenes, clip, t5 = chunk.result()
        latents.append(encode(torch.from_numpy(scenes)))
        clip_ids.append(torch.from_numpy(clip).to(device))
        t5_ids.append(torch.from_numpy(t5).to(device))
    return Pool(latents=torch.cat(latents), clip_ids=torch.cat(clip_ids), t5_ids=torch.cat(t5_ids))


def _pack(latents: Tensor) -> Tensor:
    """FluxPipeline's packing: [B, 4, 32, 32] to tokens [B, T, C]."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def train_diffusion(
    denoiser: Denoiser,
    pool: Pool,
    *,
    seconds: float,
    batch: int,
    peak_rate: float,
    warmup: int,
    compiled: bool,
    checkpoint: Callable[[], None],
    checkpoint_every: float,
) -> dict[str, float | list[tuple[int, float]]]:
    """Train in place for `seconds`; at the end `denoiser` holds the averaged weights.

    checkpoint  called about every `checkpoint_every` seconds with the averaged weights in place
    returns     steps, the last running loss, and (step, loss) along the way
    """
    device = pool.latents.device
    # cuDNN's attention backward is known to crash at sequence lengths like ours.
    torch.backends.cuda.enable_cudnn_sdp(False)
    side = pool.latents.shape[-1] // 2
    image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, device, torch.float32)
    text_ids = torch.zeros(T5_LENGTH, 3, device=device)
    transformer = denoiser.transformer

    def flow_loss(clean: Tensor, noise: Tensor, time: Tensor, text: Tensor, pooled: Tensor):
        mixed = torch.lerp(clean, noise, time[:, None, None])
        velocity = transformer(
            hidden_states=mixed,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=time,
            img_ids=image_ids,
            txt_ids=text_ids,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity.float(), noise - clean)

    step_loss = torch.compile(flow_loss, dynamic=False) if compiled else flow_loss
    parameters = denoiser.parameters()
    averaged = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=peak_rate,
        betas=(0.9, 0.99),
        weight_decay=0.01,
        fused=device.type == "cuda",
    )
    for module in denoiser.modules():
        module.train()

    step, running = 0, torch.zeros((), device=device)
    history: list[tuple[int, float]] = []
    next_checkpoint = checkpoint_every / seconds
    for step, fraction in timed_steps(seconds):
        set_rate(optimizer, peak_rate, step, fraction, warmup)
        chosen = torch.randint(len(pool.latents), (batch,), device=device)
        clean = _pack(pool.latents[chosen].float())
        noise = torch.randn_like(clean)
        time = torch.sigmoid(torch.randn(batch, device=device))
        with torch.autocast(device.type, torch.bfloat16):
            text = denoiser.t5(pool.t5_ids[chosen])[0]
            pooled = denoiser.clip(pool.clip_ids[chosen]).pooler_output
            loss = step_loss(clean, noise, time, text, pooled)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            forget = 1e-3 if step > 2000 else 1e-2
            torch._foreach_lerp_(averaged, [p.detach() for p in parameters], forget)
            running = torch.lerp(running, loss.detach(), 0.02 if step > 50 else 1 / (step + 1))
        if step % 500 == 0 or step == 20:
            history.append((step, running.item()))
            print(f"flow {step} {fraction * seconds:.0f} s loss {running.item():.4f}", flush=True)
        if fraction > next_checkpoint:
            next_checkpoint = fraction + checkpoint_every / seconds
            with swapped(parameters, averaged):
                checkpoint()
    with torch.no_grad():
        torch._foreach_copy_(parameters, averaged)
    for module in denoiser.modules():
        module.eval()
    return {"steps": step + 1, "loss": running.item(), "history": history}


@contextmanager
def swapped(parameters: list[Tensor], others: list[Tensor]) -> Iterator[None]:
    """Within the block, `parameters` hold the values of `others`."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, others)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, kept)
