"""Attention by every engine here: time on the GPU, and error of 8 bits, which CPUs show too.

usage: python benchmarks/attention.py [time] [error]

``time`` needs a CUDA GPU; every result is compared with float32 before it is timed.
FlashAttention-3 takes part where it is installed (pip install 'dirotq[attention]').
"""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dirotq.kernels.attention import engines, flash3
from dirotq.kernels.attention import reference as int8
from dirotq.kernels.attention.engines import choose
from dirotq.kernels.chip import capability
from dirotq.kernels.fp8_qkv import reference as fp8
from dirotq.kernels.full_float32 import full_float32

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of q [B, T, H, d] and k, v [B, S, H, d]."""

SHAPES = {
    "FLUX.1 1024²": (1, 4608, 4608, 24, 128),
    "FLUX.1 1024², two images": (2, 4608, 4608, 24, 128),
    "FLUX.1 2048²": (1, 16896, 16896, 24, 128),
    "FLUX.1 512²": (1, 1536, 1536, 24, 128),
    "8192 tokens": (1, 8192, 8192, 24, 128),
    "3072 tokens": (1, 3072, 3072, 24, 128),
    "SD3.5 1024²": (2, 4250, 4250, 24, 64),
    "Z-Image 1024²": (1, 4128, 4128, 30, 128),
    "PixArt 1024²": (2, 4096, 4096, 16, 72),
    "PixArt to text": (2, 4096, 300, 16, 72),
    "Wan, 10 heads": (1, 32760, 32760, 10, 128),
}
"""Images, queries, keys, heads, channels of a head. Wan has 40 heads: the time is four times as
long."""


def main(arguments: list[str]) -> int:
    if unknown := set(arguments) - {"time", "error"}:
        print(f"unknown: {', '.join(sorted(unknown))}; there are time and error", file=sys.stderr)
        return 2
    wanted = arguments or ["error", "time"]
    if "error" in wanted:
        print("error of the output, relative: rows of 128 channels, 1024 tokens")
        for name, errors in error_rows():
            print(f"  {name:<28}" + "".join(f"{n} {e:.4f}   " for n, e in errors.items()))
    if "time" in wanted:
        if not torch.cuda.is_available():
            print("times need a CUDA GPU, and torch finds none", file=sys.stderr)
            return 1
        for name, shape in SHAPES.items():
            show_times(name, shape)
    return 0


def error_rows() -> Iterator[tuple[str, dict[str, float]]]:
    """Compare kinds of 8 bits on kinds of data, on the CPU."""
    contestants: dict[str, Compute] = {
        "fp8 as it is": unrotated,
        "fp8 rotated": lambda *qkv: fp8.attention(*qkv, scale=128**-0.5),
        "int8 q, k": lambda *qkv: int8.attention(*qkv, scale=128**-0.5),
    }
    draw = torch.Generator().manual_seed(0)
    for name in ("Gaussian", "channels that stand out", "keys with an offset", "both"):
        q, k, v = (torch.randn(1, 1024, 2, 128, generator=draw) for _ in range(3))
        if name in ("channels that stand out", "both"):
            for t in (q, k):
                t[..., [3, 40]] *= 4
                t /= 1.5
        if name in ("keys with an offset", "both"):
            k += 3 * torch.randn(1, 1, 2, 128, generator=draw)
        q, k, v = (t.bfloat16() for t in (q, k, v))
        want = exact(q, k, v)
        yield name, {n: error(compute(q, k, v), want) for n, compute in contestants.items()}


def show_times(name: str, shape: tuple[int, int, int, int, int]) -> None:
    """Print the engines' microseconds, TFLOP/s and errors."""
    from dirotq.tuning.timing import copies, time_calls

    b, t, s, h, d = shape
    sets = [qkv(shape) for _ in range(copies(2 * b * h * d * (t + 2 * s)))]
    chosen = [choose(*sets[0][:2], None, None, mode) for mode in engines.MODES]
    print(f"{name}: {b} x {t} to {s}, {h} heads of {d}; exact: {chosen[0]}, fp8: {chosen[1]}")
    want = exact(*sets[0]) if t * s < 5e8 else torch_engine(*sets[0])
    for engine, compute in contestants(shape).items():
        off = error(compute(*sets[0]), want)
        us = time_calls([lambda x=x, f=compute: f(*x) for x in sets]).p50  # type: ignore[misc]
        rate = 4e-6 * b * h * t * s * d / us
        print(f"  {engine:<32}{us:9.1f} us {rate:6.0f} TFLOP/s  error {off:.4f}", flush=True)
    for part, calls in parts(sets).items():
        us = time_calls(calls).p50
        print(f"  {part:<32}{us:9.1f} us", flush=True)


def contestants(shape: tuple[int, int, int, int, int]) -> dict[str, Compute]:
    """Return every engine that runs such heads here."""
    from dirotq.kernels.attention.kernel import launch
    from dirotq.kernels.fp8_qkv.kernel import launch as codes_of

    d = shape[-1]
    found: dict[str, Compute] = {"torch": torch_engine}
    if not flash3_lacks(d, eight=False):
        found["FlashAttention-3"] = lambda *qkv: flash3.exact(*qkv, scale=d**-0.5)
    if not flash3_lacks(d, eight=True):
        found["FlashAttention-3 FP8, with codes"] = lambda *qkv: flash3.fp8(
            codes_of(*qkv), scale=d**-0.5
        )
    if not engines.why_not(chip(), d):
        found["ours INT8, with codes"] = lambda *qkv: launch(*qkv, scale=d**-0.5)
    return found


def parts(sets: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, list[Callable[[], object]]]:
    """Return the steps of FP8: the codes, torch's casts for comparison, and the product."""
    from dirotq.kernels.fp8_qkv.kernel import launch as codes_of

    d = sets[0][0].shape[-1]
    if d % 16 or engines.why_not(chip(), d):
        return {}
    found: dict[str, list[Callable[[], object]]] = {
        "codes alone": [lambda x=x: codes_of(*x) for x in sets],  # type: ignore[misc]
        "casts by torch, no scales": [
            lambda x=x: [t.to(torch.float8_e4m3fn) for t in x]  # type: ignore[misc]
            for x in sets
        ],
    }
    if not flash3_lacks(d, eight=True):
        made = [codes_of(*x) for x in sets]
        found["FlashAttention-3 FP8 alone"] = [
            lambda c=c: flash3.fp8(c, scale=d**-0.5)  # type: ignore[misc]
            for c in made
        ]
    return found


def flash3_lacks(d: int, *, eight: bool) -> str | None:
    return flash3.why_not(chip(), d, torch.bfloat16, fp8=eight)


def chip() -> int | None:
    return capability(torch.device("cuda"))


def qkv(shape: tuple[int, int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q alone, k and v as columns of one tensor, keys with an offset."""
    b, t, s, h, d = shape
    q = torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(b, s, 2, h, d, device="cuda", dtype=torch.bfloat16)
    kv[:, :, 0] += torch.randn(h, d, device="cuda", dtype=torch.bfloat16)
    return q, kv[:, :, 0], kv[:, :, 1]


def torch_engine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention in float32."""
    with full_float32():
        return torch_engine(q.float(), k.float(), v.float())


def unrotated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention on FP8 codes of q, k and v as they are, one scale per head."""
    scales = [t.float().abs().amax((1, 3)) / fp8.E4M3_MAX for t in (q, k, v)]
    codes = [
        (t.float() / s[:, None, :, None]).to(torch.float8_e4m3fn)
        for t, s in zip((q, k, v), scales, strict=True)
    ]
    return fp8.attend(fp8.Codes(*codes, *scales), scale=q.shape[-1] ** -0.5)


def error(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
