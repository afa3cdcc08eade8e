"""`make bench-memory`: GPU memory of FLUX.1-dev's whole packed pipeline, phase by phase.

CLIP-L, T5-XXL, the autoencoder and the packed transformer have the published shapes and random
content. For each way, two images of four steps are made, and what torch had allocated at the peak
of both, with what recorded CUDA graphs hold, stands beside what dirotq/quantize/running.py says
(without the CUDA context, which torch does not count). ARGS="--shapes" prints that for FLUX.1-dev
and FLUX.2-dev, without a GPU.
"""

import argparse
import gc
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import diffusers
import torch
import transformers
from torch import nn

from dirotq.benchmarks.contestants import RANK, planned, random_packed
from dirotq.benchmarks.whole_images import CLIP, T5, whole
from dirotq.kernels.weight_only import Bits, rounded
from dirotq.models.autoencoders import tile
from dirotq.models.families import family_of
from dirotq.packed.swap import put_packed
from dirotq.packed.text_encoders import BITS
from dirotq.packed.text_quantizer import PACKED, packable, put_weight_only, token_embeddings
from dirotq.quantize.running import CONTEXT, PHASES, TOLD, Running, Way, activations
from dirotq.runtime.accelerate import accelerate
from dirotq.runtime.graphs import GraphedForward
from dirotq.sources.opening import place

STEPS = 4
IMAGES = 2
"""The first one records the graphs that the second one's encoding goes beside."""
VOCABULARY = {"text_encoder": 49408, "text_encoder_2": 32128}
"""Of the published tokenizers; those that are trained here are small."""
CALL = {"height": 1024, "width": 1024, "max_sequence_length": 512, "guidance_scale": 3.5}
MISTRAL = {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
           "vocab_size": 131072}  # fmt: skip
"""mistralai/Mistral-Small-3.2-24B-Instruct-2506, whose text model FLUX.2-dev reads."""
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 16,
}
VAE_2 = {
    "_class_name": "AutoencoderKLFlux2",
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 32,
}
VAE_BYTES = 168_000_000
SHOWN = {
    "none": TOLD["none"],
    "none, without CUDA graphs": Way("none"),
    "none, tiles": TOLD["none, tiled"],
    "none, tiles, without CUDA graphs": Way("none", tiled=True),
    "model": TOLD["model"],
    "group": TOLD["group"],
}
"""What is printed and measured, by its name in docs/low-vram.md."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", action="store_true", help="what is expected, without a GPU")
    parser.add_argument("--text-encoders", default="w4", choices=("keep", *BITS))
    parser.add_argument("--ways", nargs="+", default=list(SHOWN), choices=list(SHOWN))
    options = parser.parse_args()
    if options.shapes:
        print("\n".join(shapes(options.text_encoders)))
        return
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `dirotq` does
    began = time.perf_counter()
    pipe = pipeline(options.text_encoders)
    said = expected(pipe)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, FLUX.1-dev, text encoders "
          f"{options.text_encoders}, made in {time.perf_counter() - began:.0f} s\n\n"
          "| in host memory | phase | GB told | GB allocated | of it idle graphs | GB reserved |\n"
          "|---|---|---|---|---|---|")  # fmt: skip
    for way in options.ways:
        told = said.phases(SHOWN[way])
        for phase, *found in measured(pipe, way):
            row = " | ".join(f"{v / 1e9:.2f}" for v in (told[phase] - CONTEXT, *found))
            print(f"| {way} | {phase} | {row} |", flush=True)
    print(f"\n{time.perf_counter() - began:.0f} s in all")


def pipeline(width: str, device: str = "cuda", sizes: Any = None, **changes: Any) -> Any:
    """Make the pipeline in host memory, part by part; ``sizes``, ``changes`` are for tests."""
    made = whole("flux", device, sizes)
    for name, rows in VOCABULARY.items():
        encoder = made.parts[name]
        if sizes is None:
            encoder.resize_token_embeddings(rows, mean_resizing=False)
        if width in BITS:
            pack(encoder, BITS[width])
        encoder.to("cpu")
    made.parts["vae"].to("cpu")
    transformer = random_packed("flux", device, **changes).to("cpu")
    return made.of(transformer)


def pack(encoder: Any, bits: Bits) -> None:
    """Round the weights of a text encoder in memory, in place."""
    likes = dict(encoder.named_modules())
    _put(encoder, bits)
    made: dict[int, Any] = {}  # what shared weights in 16 bits shares them still
    for name, packed in encoder.named_modules():
        if isinstance(packed, PACKED):
            weight = likes[name].weight.data
            if weight.data_ptr() not in made:
                packed.weight.data, scale = rounded(weight, getattr(packed, "bits", 8))
                packed.scale.data = scale.to(packed.scale.dtype)
                made[weight.data_ptr()] = packed
            first = made[weight.data_ptr()]
            packed.weight, packed.scale = first.weight, first.scale
            if getattr(packed, "bias", None) is not None:
                packed.bias.data.copy_(likes[name].bias.data)


def _put(encoder: Any, bits: Bits) -> list[str]:
    """Put modules for codes into a text encoder; return the paths of its embeddings."""
    embeddings, _ = token_embeddings(encoder)
    put_weight_only(encoder, bits, packable(encoder, bits), embeddings, "lm4")
    return embeddings


def expected(pipe: Any) -> Running:
    """Return what running.py says of a pipeline in memory."""
    parts = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    return Running(
        weights={name: _bytes([part]) for name, part in parts.items()},
        layers={n: max(_own(m) for m in part.modules()) for n, part in parts.items()},
        **_alive(
            pipe.transformer, {**pipe.vae.config, "_class_name": type(pipe.vae).__name__}, CALL
        ),
    )


def measured(
    pipe: Any, name: str, device: str = "cuda", call: Mapping[str, Any] = CALL
) -> Iterator[tuple[str, int, int, int]]:
    """Make images; yield (phase, peak of what is allocated and what idle graphs hold, the latter
    alone, peak of what torch reserved)."""
    way = SHOWN[name]
    resident = way.offloading == "none"
    found = dict.fromkeys(PHASES, (0, 0, 0))
    idle, encoding = 0, False
    _reset(device)  # making the parts took more than they do

    def end(phase: str) -> None:
        nonlocal idle
        allocated, reserved = _peak(device)
        before = found[phase]
        found[phase] = (
            *max(before[:2], (allocated + idle, idle)), max(before[2], reserved)
        )  # fmt: skip
        idle = _held(pipe.transformer)

    def encoded(*_: Any) -> None:
        nonlocal encoding
        if encoding:
            end("encode")
        encoding = False

    plain = pipe.vae.decode

    def decode(*args: Any, **kwargs: Any) -> Any:
        end("denoise")
        return plain(*args, **kwargs)

    place(pipe, torch.device(device), way.offloading)
    accelerate(pipe.transformer, compile=resident, graphs=way.graphs)
    if way.tiled:
        tile(pipe.vae)
    end("load")
    hook = pipe.transformer.register_forward_pre_hook(encoded)
    pipe.vae.decode = decode
    try:
        for _ in range(IMAGES):
            encoding = True
            pipe("a red star", num_inference_steps=STEPS, output_type="pt", **call)
            end("decode")
    finally:
        hook.remove()
        del pipe.vae.decode
        _home(pipe, device)
    yield from ((phase, *found[phase]) for phase in PHASES)


def shapes(width: str) -> Iterable[str]:
    """Yield lines of a table of what is expected of FLUX.1-dev and FLUX.2-dev."""
    with torch.device("meta"):
        clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=49408, **CLIP))
        t5 = transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **T5)
        )
        mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**MISTRAL))
        flux = diffusers.FluxTransformer2DModel(guidance_embeds=True)
        flux2 = diffusers.Flux2Transformer2DModel()
    yield f"| text encoders {width} | in host memory | {' | '.join(f'{p}, GB' for p in PHASES)} |"
    yield f"|---|---|{'---|' * len(PHASES)}"
    for name, encoders, transformer, vae in (
        ("FLUX.1-dev", {"text_encoder": clip, "text_encoder_2": t5}, flux, VAE),
        ("FLUX.2-dev", {"text_encoder": mistral}, flux2, VAE_2),
    ):
        running = _by_shapes(encoders, transformer, vae, width)
        for way, made in SHOWN.items():
            told = " | ".join(f"{v / 1e9:.1f}" for v in running.phases(made).values())
            yield f"| {name} | {way} | {told} |"


def _by_shapes(encoders: Any, transformer: Any, vae: Mapping[str, Any], width: str) -> Running:
    family = family_of(type(transformer).__name__)
    put_packed(transformer, planned(family, transformer, "dirotq", RANK).items())
    for encoder in encoders.values():
        for name in _put(encoder, BITS[width])[1:] if width in BITS else ():
            encoder.set_submodule(name, nn.Identity())  # what shares its weights with the first one
    parts = {**encoders, "transformer": transformer}
    return Running(
        weights={n: _bytes([part]) for n, part in parts.items()} | {"vae": VAE_BYTES},
        layers={n: max(map(_own, part.modules())) for n, part in parts.items()}
        | {"vae": 9_500_000},
        **_alive(transformer, vae, CALL),
    )


def _alive(transformer: Any, vae: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    specs = [m.spec for m in transformer.modules() if hasattr(m, "spec")]
    wide = max(spec.in_features + spec.outputs for spec in specs)
    return activations(transformer.config, vae, wide, call)


def _bytes(modules: Iterable[nn.Module]) -> int:
    tensors = [t for m in modules for t in m.parameters()]
    return sum(t.numel() * (2 if t.dtype == torch.float32 else t.element_size()) for t in tensors)


def _own(module: nn.Module) -> int:
    return sum(t.numel() * min(t.element_size(), 2) for t in module.parameters(recurse=False))


def _peak(device: str) -> tuple[int, int]:
    """Return the peaks since the last look."""
    if device != "cuda":
        return 0, 0
    torch.cuda.synchronize()
    found = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return found


def _held(transformer: Any) -> int:
    """Return the bytes of a transformer's graphs between calls."""
    forward = transformer.forward
    return forward.memory() if isinstance(forward, GraphedForward) else 0


def _reset(device: str) -> None:
    """Give back what torch holds beside tensors, and begin its peaks anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _home(pipe: Any, device: str) -> None:
    """Take all hooks off, and everything back to host memory."""
    pipe.remove_all_hooks()
    for part in pipe.components.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            if (registry := getattr(module, "_diffusers_hook", None)) is not None:
                for name in list(registry.hooks):
                    registry.remove_hook(name, recurse=False)
    accelerate(pipe.transformer, compile=False, graphs=False)
    pipe.vae.disable_tiling()
    pipe.to("cpu")
    _reset(device)


if __name__ == "__main__":
    main()
