"""Train tiny-flux's autoencoder on rendered scenes."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from dirotq.assets.scenes import render, sample_side
from dirotq.assets.schedule import set_rate, timed_steps
from dirotq.assets.tiny_flux import build_autoencoder

_PEAK_RATE = 2e-3
_KL_WEIGHT = 3e-4
_EDGE_WEIGHT = 1.0


def pool_scenes(count: int, *, seed: int) -> Tensor:
    """`count` random training scenes: int64 [count, 22]."""
    return sample_side(count, heldout=False, generator=torch.Generator().manual_seed(seed))


def to_bytes(scenes: Tensor, *, device: torch.device, batch: int = 512) -> Tensor:
    """Render scenes [B, 22] to uint8 [B, 3, 128, 128] on `device`."""
    parts = [((render(part.to(device)) + 1) * 127.5).round().byte() for part in scenes.split(batch)]
    return torch.cat(parts)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def _edges(images: Tensor) -> tuple[Tensor, Tensor]:
    return images[..., 1:] - images[..., :-1], images[..., 1:, :] - images[..., :-1, :]


def _loss(autoencoder: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Training loss and the plain L1 error of images [B, 3, 128, 128] in [-1, 1]."""
    posterior = autoencoder.encode(images).latent_dist
    decoded = autoencoder.decode(posterior.sample()).sample.float()
    error = (decoded - images).abs().mean()
    edges = sum((a - b).abs().mean() for a, b in zip(_edges(decoded), _edges(images), strict=True))
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return error + _EDGE_WEIGHT * edges + _KL_WEIGHT * divergence, error.detach()


@torch.no_grad()
def encode_pool(autoencoder: AutoencoderKL, images: Tensor, batch: int = 512) -> Tensor:
    """Latents as the transformer sees them (shifted, scaled): bfloat16 [B, 4, 32, 32].

    images  uint8 [B, 3, 128, 128]; the autoencoder's own dtype does the work
    """
    shift, scale = autoencoder.config.shift_factor, autoencoder.config.scaling_factor
    parts = []
    for part in images.split(batch):
        mean = autoencoder.encode(from_bytes(part).to(autoencoder.dtype)).latent_dist.mean
        parts.append(((mean.float() - shift) * scale).bfloat16())
    return torch.cat(parts)


def train_autoencoder(
    *, seconds: float, batch: int, pool: int, seed: int, device: torch.device
) -> tuple[AutoencoderKL, dict[str, float]]:
    """Train for `seconds`; the latents of the result are shifted and scaled to unit variance."""
    images = to_bytes(pool_scenes(pool, seed=seed), device=device)
    autoencoder = build_autoencoder().to(device).train()
    parameters = list(autoencoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    step, error = 0, torch.tensor(0.0)
    for step, fraction in timed_steps(seconds):
        set_rate(optimizer, _PEAK_RATE, step, fraction, warmup=200)
        chosen = torch.randint(len(images), (batch,), device=device)
        clean = from_bytes(images[chosen])
        with torch.autocast(device.type, torch.bfloat16):
            loss, error = _loss(autoencoder, clean)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 250 == 0:
            print(f"autoencoder {step} loss {loss.item():.4f} L1 {error.item():.4f}", flush=True)
    autoencoder.eval().requires_grad_(False)
    shift, scale = measure_latents(autoencoder, images[:4096])
    autoencoder.register_to_config(shift_factor=shift, scaling_factor=scale)
    return autoencoder, {"steps": step + 1, "l1": error.item(), "seconds": seconds}


@torch.no_grad()
def measure_latents(autoencoder: AutoencoderKL, images: Tensor) -> tuple[float, float]:
    """Shift and scale that bring the latents of `images` (uint8) to mean 0, deviation 1."""
    latents = torch.cat(
        [
            autoencoder.encode(from_bytes(part)).latent_dist.mean.float()
            for part in images.split(512)
        ]
    )
    return latents.mean().item(), 1.0 / latents.std().item()
