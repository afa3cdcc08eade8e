"""Train everything under assets/ from nothing: python -m dirotq.assets.train_tiny_flux --out DIR

Parts, in order: tokenizers, autoencoder, attribute reader, transformer with text encoders,
evaluation. Each is saved when it is done and skipped when its output exists.
"""

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from dirotq.assets import evaluate
from dirotq.assets.captions import captions_of, prompt_rows
from dirotq.assets.denoisers import FluxDenoiser
from dirotq.assets.make_prompts import CALIBRATION_SEED, HELDOUT_SEED
from dirotq.assets.record import note, note_machine
from dirotq.assets.scenes import sample_side
from dirotq.assets.tiny_flux import save_pipeline, train_tokenizers
from dirotq.assets.train_autoencoder import encode_pool, to_bytes, train_autoencoder
from dirotq.assets.train_diffusion import train_diffusion
from dirotq.assets.train_reader import train_reader
from dirotq.assets.training_pool import build_pool, captions_in_background, load_tokenizers
from dirotq.evaluate.attribute_reader import AttributeReader

_SHIFTS = (1.0, 1.5, 2.0, 3.0)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--init", type=Path, help="an earlier --out: copy it and continue training the diffusion"
    )
    parser.add_argument("--vae-seconds", type=float, default=70)
    parser.add_argument("--reader-seconds", type=float, default=45)
    parser.add_argument("--seconds", type=float, default=300, help="of diffusion training")
    parser.add_argument(
        "--finish-by",
        type=float,
        help="shorten diffusion training so that it ends this many seconds after the start",
    )
    parser.add_argument("--pool", type=int, default=500_000, help="scenes for the diffusion")
    parser.add_argument("--image-pool", type=int, default=49_152, help="scenes for VAE and reader")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--image-batch", type=int, default=128)
    parser.add_argument("--peak-rate", type=float, default=1.2e-3)
    parser.add_argument(
        "--emphasis", type=float, default=0.0, help="share drawn only from gradient and dotted"
    )
    parser.add_argument("--shift", type=float, default=2.0, help="of the sampling schedule")
    parser.add_argument("--eval-count", type=int, default=512, help="held-out captions; 0 skips")
    parser.add_argument("--scan-shifts", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def tokenizers_part(folder: Path, seed: int) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Train the tokenizers on captions, or load them."""
    if not (folder / "tokenizer_2").exists():
        generator = torch.Generator().manual_seed(seed)
        scenes = sample_side(8000, heldout=False, generator=generator)
        clip, t5 = train_tokenizers(captions_of(scenes, seed))
        clip.save_pretrained(folder / "tokenizer")
        t5.save_pretrained(folder / "tokenizer_2")
    return load_tokenizers(folder)


def autoencoder_part(folder: Path, arguments: argparse.Namespace) -> AutoencoderKL:
    """Train the autoencoder, or load it: always the bfloat16 weights that are shipped."""
    if not (folder / "vae").exists():
        autoencoder, report = train_autoencoder(
            seconds=arguments.vae_seconds,
            batch=arguments.image_batch,
            pool=arguments.image_pool,
            seed=arguments.seed + 1,
            device=torch.device(arguments.device),
        )
        autoencoder.to(torch.bfloat16).save_pretrained(folder / "vae")
        note(folder, autoencoder=report)
        print("autoencoder", report, flush=True)
    return AutoencoderKL.from_pretrained(folder / "vae").to(arguments.device)


def reader_part(
    folder: Path, autoencoder: AutoencoderKL, arguments: argparse.Namespace
) -> AttributeReader:
    """Train the attribute reader, or load it."""
    home = arguments.out / "attribute-reader"
    if not (home / "model.safetensors").exists():
        reader, report = train_reader(
            autoencoder,
            seconds=arguments.reader_seconds,
            batch=2 * arguments.image_batch,
            pool=arguments.image_pool,
            seed=arguments.seed + 2,
            device=torch.device(arguments.device),
        )
        reader.save(home)
        note(folder, reader=report)
        print("reader", report, flush=True)
    return AttributeReader.load(home).to(arguments.device)


def diffusion_part(
    folder: Path,
    tokenizers: tuple[CLIPTokenizer, T5Tokenizer],
    autoencoder: AutoencoderKL,
    arguments: argparse.Namespace,
    chunks: list[Any],
    started: float,
) -> None:
    """Train transformer and text encoders, from `--init` or from nothing, and save the folder."""
    device = torch.device(arguments.device)
    continued = (folder / "transformer").exists()
    denoiser = FluxDenoiser.trained(folder) if continued else FluxDenoiser.untrained(tokenizers)
    for module in denoiser.modules():
        module.to(device, torch.float32)

    shipped = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.bfloat16).to(device)
    began = time.perf_counter()

    def encode(scenes: Tensor) -> Tensor:
        return encode_pool(shipped, to_bytes(scenes, device=device))

    pool = build_pool(chunks, encode, device)
    print(f"pool of {len(pool.latents)}: waited {time.perf_counter() - began:.0f} s", flush=True)

    def save() -> None:
        copies = FluxDenoiser.untrained(tokenizers)
        for copy, module in zip(copies.modules(), denoiser.modules(), strict=True):
            copy.load_state_dict({k: v.cpu() for k, v in module.state_dict().items()})
        save_pipeline(
            folder,
            tokenizers=tokenizers,
            autoencoder=AutoencoderKL.from_pretrained(folder / "vae"),
            clip=copies.clip,
            t5=copies.t5,
            transformer=copies.transformer,
            shift=arguments.shift,
        )

    seconds = arguments.seconds
    if arguments.finish_by:
        left = started + arguments.finish_by - time.perf_counter()
        seconds = min(seconds, max(left, 10.0))
    report = train_diffusion(
        denoiser,
        pool,
        seconds=seconds,
        batch=arguments.batch,
        peak_rate=arguments.peak_rate,
        warmup=100 if continued else 500,
        emphasis=arguments.emphasis,
        compiled=arguments.compile,
        checkpoint=save,
        checkpoint_every=100,
    )
    save()
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in zip(("transformer", "clip", "t5"), denoiser.modules(), strict=True)
    }
    sizes["autoencoder"] = sum(p.numel() for p in autoencoder.parameters())
    record = report | {
        "seed": arguments.seed,
        "seconds": seconds,
        "batch": arguments.batch,
        "pool": len(pool.latents),
        "peak_rate": arguments.peak_rate,
        "emphasis": arguments.emphasis,
    }
    part = f"diffusion_continued_with_seed_{arguments.seed}" if continued else "diffusion"
    # What was measured on earlier weights is no longer true.
    stale = dict.fromkeys(("evaluation", "accuracy_by_shift_on_trained_side"))
    note(folder, **stale, **{part: record}, parameters=sizes)


def evaluation_part(folder: Path, reader: AttributeReader, arguments: argparse.Namespace) -> None:
    """Score the saved folder on held-out captions and draw the grid."""
    count, device, batch = arguments.eval_count, torch.device(arguments.device), 128
    rows = prompt_rows(count, heldout=True, seed=HELDOUT_SEED)
    report, images = evaluate.judge(folder, reader, rows, device=device, batch=batch)
    note(folder, evaluation=report)
    print({k: v for k, v in report.items() if k != "kurtosis"}, flush=True)
    evaluate.draw_grid(images, rows, folder / "samples.png")
    if arguments.scan_shifts:
        seen = prompt_rows(min(count, 256), heldout=False, seed=CALIBRATION_SEED)
        scan = evaluate.scan(folder, reader, seen, "shift", _SHIFTS, device=device, batch=batch)
        note(folder, accuracy_by_shift_on_trained_side=scan)
        print("mean by shift", {k: scores["mean"] for k, scores in scan.items()}, flush=True)


def main() -> None:
    started = time.perf_counter()
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if arguments.init:
        for part in ("tiny-flux", "attribute-reader"):
            shutil.copytree(arguments.init / part, arguments.out / part, dirs_exist_ok=True)
    folder = arguments.out / "tiny-flux"
    folder.mkdir(parents=True, exist_ok=True)

    def clock(what: str) -> None:
        print(f"[{time.perf_counter() - started:.0f} s] {what}", flush=True)

    tokenizers = tokenizers_part(folder, arguments.seed)
    clock("tokenizers ready")
    train = arguments.init is not None or not (folder / "model_index.json").exists()
    pool = arguments.pool if train else 0
    with captions_in_background(folder, pool, arguments.seed + 1000) as chunks:
        autoencoder = autoencoder_part(folder, arguments)
        clock("autoencoder ready")
        reader = reader_part(folder, autoencoder, arguments)
        clock("reader ready")
        if train:
            diffusion_part(folder, tokenizers, autoencoder, arguments, chunks, started)
            clock("diffusion ready")
    note_machine(folder, torch.device(arguments.device))
    note(folder, reader_parameters=sum(p.numel() for p in reader.parameters()))
    if arguments.eval_count:
        evaluation_part(folder, reader, arguments)
        clock("evaluated")


if __name__ == "__main__":
    main()
