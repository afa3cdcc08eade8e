"""Train tiny-pixart with tiny-flux's parts: python -m dirotq.assets.train_tiny_pixart --out DIR

Tokenizer, autoencoder and the start of T5 are tiny-flux's. Parts, in order: transformer with T5,
the choice of the guidance scale, evaluation.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtTransformer2DModel
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from dirotq.assets import evaluate
from dirotq.assets.captions import prompt_rows
from dirotq.assets.denoisers import PixArtDenoiser
from dirotq.assets.make_prompts import CALIBRATION_SEED, HELDOUT_SEED
from dirotq.assets.record import note, note_machine
from dirotq.assets.tiny_pixart import build_transformer, save_pipeline, write_generation
from dirotq.assets.train_autoencoder import encode_pool, to_bytes
from dirotq.assets.train_diffusion import train_diffusion
from dirotq.assets.training_pool import build_pool, captions_in_background
from dirotq.evaluate.attribute_reader import AttributeReader

_HOME = Path(__file__).parent
_FLUX = _HOME / "tiny-flux"
_GUIDANCE = (1.5, 2.0, 3.0, 4.5)
_TOLERANCE = 0.002  # of caption accuracy, about one caption of 512


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="an earlier --out: continue its training")
    parser.add_argument("--seconds", type=float, default=400, help="of training")
    parser.add_argument(
        "--finish-by",
        type=float,
        help="shorten training so that it ends this many seconds after the start",
    )
    parser.add_argument("--pool", type=int, default=500_000, help="scenes")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--peak-rate", type=float, default=1.2e-3)
    parser.add_argument(
        "--emphasis", type=float, default=0.2, help="share drawn only from gradient and dotted"
    )
    parser.add_argument("--dropout", type=float, default=0.1, help="share of empty captions")
    parser.add_argument("--eval-count", type=int, default=512, help="held-out captions; 0 skips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def load_autoencoder() -> AutoencoderKL:
    """tiny-flux's autoencoder without its shift of latents: PixArtSigmaPipeline knows none."""
    autoencoder = AutoencoderKL.from_pretrained(_FLUX / "vae")
    autoencoder.register_to_config(shift_factor=0.0, _name_or_path="")
    return autoencoder


def diffusion_part(
    folder: Path, chunks: list[Any], arguments: argparse.Namespace, started: float
) -> None:
    """Train transformer and T5, from `--init` or T5 from tiny-flux, and save the folder."""
    device = torch.device(arguments.device)
    tokenizer = T5Tokenizer.from_pretrained(_FLUX / "tokenizer_2")
    if arguments.init:
        earlier = arguments.init / "tiny-pixart"
        transformer = PixArtTransformer2DModel.from_pretrained(earlier / "transformer")
        t5 = T5EncoderModel.from_pretrained(earlier / "text_encoder")
    else:
        transformer = build_transformer()
        t5 = T5EncoderModel.from_pretrained(_FLUX / "text_encoder_2")
    denoiser = PixArtDenoiser(transformer=transformer, t5=t5, dropout=arguments.dropout)
    for module in denoiser.modules():
        module.to(device, torch.float32)

    # As the pipeline will run it; 16-bit convolutions take seconds an image on a CPU.
    shipped = load_autoencoder().to(
        device, torch.bfloat16 if device.type == "cuda" else torch.float32
    )

    def encode(scenes: Tensor) -> Tensor:
        return encode_pool(shipped, to_bytes(scenes, device=device))

    pool = build_pool(chunks, encode, device)
    print(f"[{time.perf_counter() - started:.0f} s] pool of {len(pool.latents)}", flush=True)

    def save() -> None:
        copies = build_transformer(), T5EncoderModel(t5.config)
        for copy, module in zip(copies, denoiser.modules(), strict=True):
            copy.load_state_dict({k: v.cpu() for k, v in module.state_dict().items()})
        save_pipeline(
            folder,
            tokenizer=tokenizer,
            autoencoder=load_autoencoder(),
            t5=copies[1],
            transformer=copies[0],
            guidance=_GUIDANCE[1],
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
        warmup=100 if arguments.init else 500,
        emphasis=arguments.emphasis,
        compiled=arguments.compile,
        checkpoint=save,
        checkpoint_every=100,
    )
    save()
    record = report | {
        "seed": arguments.seed,
        "seconds": seconds,
        "batch": arguments.batch,
        "pool": len(pool.latents),
        "peak_rate": arguments.peak_rate,
        "emphasis": arguments.emphasis,
        "dropout": arguments.dropout,
    }
    part = f"diffusion_continued_with_seed_{arguments.seed}" if arguments.init else "diffusion"
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in (("transformer", transformer), ("t5", t5), ("autoencoder", shipped))
    }
    note(folder, **{part: record}, parameters=sizes)
    note_machine(folder, device)


def choose_guidance(accuracy: dict[str, dict[str, float]]) -> float:
    """The strongest guidance that costs no accuracy: real pipelines are guided strongly.

    accuracy  by guidance scale, as `evaluate.scan` returns it
    """
    best = max(scores["mean"] for scores in accuracy.values())
    return max(float(g) for g, s in accuracy.items() if s["mean"] >= best - _TOLERANCE)


def evaluation_part(folder: Path, arguments: argparse.Namespace) -> None:
    """Choose the guidance on trained-side captions, score held-out ones, draw the grid."""
    device, batch = torch.device(arguments.device), 128
    reader = AttributeReader.load(_HOME / "attribute-reader").to(device)
    seen = prompt_rows(min(arguments.eval_count, 256), heldout=False, seed=CALIBRATION_SEED)
    by_guidance = evaluate.scan(
        folder, reader, seen, "guidance_scale", _GUIDANCE, device=device, batch=batch
    )
    print("mean by guidance", {k: s["mean"] for k, s in by_guidance.items()}, flush=True)
    note(folder, accuracy_by_guidance_on_trained_side=by_guidance)
    write_generation(folder, choose_guidance(by_guidance))
    rows = prompt_rows(arguments.eval_count, heldout=True, seed=HELDOUT_SEED)
    report, images = evaluate.judge(folder, reader, rows, device=device, batch=batch)
    note(folder, evaluation=report)
    print({k: v for k, v in report.items() if k != "kurtosis"}, flush=True)
    evaluate.draw_grid(images, rows, folder / "samples.png")


def main() -> None:
    started = time.perf_counter()
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    folder = arguments.out / "tiny-pixart"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.init:
        shutil.copy(arguments.init / "tiny-pixart" / "training.json", folder)
        # What was measured on earlier weights is no longer true.
        note(folder, evaluation=None, accuracy_by_guidance_on_trained_side=None)
    with captions_in_background(_FLUX, arguments.pool, arguments.seed + 2000) as chunks:
        diffusion_part(folder, chunks, arguments, started)
    print(f"[{time.perf_counter() - started:.0f} s] trained", flush=True)
    if arguments.eval_count:
        evaluation_part(folder, arguments)
        print(f"[{time.perf_counter() - started:.0f} s] evaluated", flush=True)
    print(json.dumps(json.loads((folder / "generation.json").read_text())), flush=True)


if __name__ == "__main__":
    main()
