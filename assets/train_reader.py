"""Train the attribute reader on rendered scenes, and on what the autoencoder makes of them."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from dirotq.assets.captions import attributes_of
from dirotq.assets.scenes import (
    BACKGROUNDS,
    CELL,
    COLOR,
    COLOR_1,
    COLOR_2,
    COLORS,
    KIND,
    POSITIONS,
    SHAPE,
    SHAPES,
    SIZE,
    SIZES,
    sample_side,
    slots,
)
from dirotq.assets.schedule import set_rate, timed_steps
from dirotq.assets.train_autoencoder import from_bytes, pool_scenes, to_bytes
from dirotq.evaluate.attribute_reader import ABSENT, AttributeReader, ReaderConfig, caption_accuracy

_PEAK_RATE = 2e-3


def build_reader() -> AttributeReader:
    """An untrained reader of this package's scenes."""
    return AttributeReader(
        ReaderConfig(
            shapes=SHAPES,
            colors=COLORS,
            sizes=SIZES,
            positions=POSITIONS,
            backgrounds=BACKGROUNDS,
        )
    )


def reader_targets(scenes: Tensor) -> dict[str, Tensor]:
    """What `AttributeReader.targets` says of each scene [B, 22], straight from the tensor."""
    cells = torch.full((3, len(scenes), len(POSITIONS) + 1), ABSENT, device=scenes.device)
    cells[0] = 0
    objects = slots(scenes)
    where = objects[..., CELL] % (len(POSITIONS) + 1)  # an empty slot (-1) writes the extra cell
    for target, field, offset in zip(cells, (SHAPE, COLOR, SIZE), (1, 0, 0), strict=True):
        target.scatter_(1, where, objects[..., field] + offset)
    shape, color, size = cells[..., :-1]
    return {
        "shape": shape,
        "color": color,
        "size": size,
        "kind": scenes[:, KIND],
        "color_1": scenes[:, COLOR_1],
        "color_2": scenes[:, COLOR_2] + 1,
    }


@torch.no_grad()
def round_trips(autoencoder: AutoencoderKL, images: Tensor, batch: int = 256) -> Tensor:
    """Images (uint8) encoded, disturbed a little and decoded again: uint8, same shape."""
    parts = []
    for part in images.split(batch):
        with torch.autocast(images.device.type, torch.bfloat16):
            latents = autoencoder.encode(from_bytes(part)).latent_dist.mean.float()
            amount = 0.35 * torch.rand(len(part), 1, 1, 1, device=images.device)
            noise = torch.randn_like(latents) / autoencoder.config.scaling_factor
            decoded = autoencoder.decode(latents + amount * noise).sample.float()
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(parts)


def _disturb(images: Tensor) -> Tensor:
    """Slight blur, contrast and noise of a random strength per image; [B, 3, L, L] in [0, 1]."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blur, contrast, noise = torch.rand(3, len(images), 1, 1, 1, device=images.device)
    images = torch.lerp(images, blurred, blur)
    images = 0.5 + (images - 0.5) * (0.85 + 0.3 * contrast)
    return (images + 0.06 * noise * torch.randn_like(images)).clamp(0, 1)


def train_reader(
    autoencoder: AutoencoderKL,
    *,
    seconds: float,
    batch: int,
    pool: int,
    seed: int,
    device: torch.device,
) -> tuple[AttributeReader, dict[str, float]]:
    """Train for `seconds`; half of every batch are round trips through the autoencoder."""
    scenes = pool_scenes(pool, seed=seed)
    rendered = to_bytes(scenes, device=device)
    images = torch.cat([rendered, round_trips(autoencoder, rendered)])
    targets = {k: torch.cat([v, v]).to(device) for k, v in reader_targets(scenes).items()}

    reader = build_reader().to(device).train()
    parameters = list(reader.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=_PEAK_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    step, loss = 0, torch.tensor(0.0)
    for step, fraction in timed_steps(seconds):
        set_rate(optimizer, _PEAK_RATE, step, fraction, warmup=200)
        chosen = torch.randint(len(images), (batch,), device=device)
        seen = _disturb(from_bytes(images[chosen]) * 0.5 + 0.5)
        with torch.autocast(device.type, torch.bfloat16):
            logits = reader(seen)
        losses = [
            F.cross_entropy(logits[name].float(), target[chosen], ignore_index=ABSENT)
            for name, target in targets.items()
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 250 == 0:
            print(f"reader {step} loss {loss.item():.4f}", flush=True)
    reader.eval().requires_grad_(False)
    report = {"steps": step + 1, "loss": loss.item(), "seconds": seconds}
    return reader, report | reader_accuracy(reader, autoencoder, seed=seed, device=device)


def reader_accuracy(
    reader: AttributeReader, autoencoder: AutoencoderKL, *, seed: int, device: torch.device
) -> dict[str, float]:
    """The reader's mean accuracy on held-out scenes, rendered and after a round trip."""
    generator = torch.Generator().manual_seed(seed)
    scenes = sample_side(512, heldout=True, generator=generator)
    attributes = [attributes_of(scene) for scene in scenes]
    rendered = to_bytes(scenes, device=device)
    accuracy = {}
    for name, images in (
        ("rendered", rendered),
        ("round_trip", round_trips(autoencoder, rendered)),
    ):
        accuracy[name] = caption_accuracy(reader, images.float() / 255, attributes)["mean"]
    return accuracy
