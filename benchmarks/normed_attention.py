"""Norm, rotation and attention together: exact, and in FP8 with codes written by the norm.

usage: python benchmarks/normed_attention.py [time] [error]

``time`` needs a Hopper GPU with FlashAttention-3 (pip install 'dirotq[attention]'); ``error`` runs
on CPUs.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dirotq.benchmarks.attention import error, exact
from dirotq.benchmarks.norm_rope_rows import EPS, Inputs, Queries, inputs
from dirotq.kernels.attention import engines, flash3, normed
from dirotq.kernels.chip import capability
from dirotq.kernels.fp8_qkv import reference as fp8
from dirotq.kernels.norm_rope import codes, norm_rope, reference

CASES = (
    Queries(name="FLUX.1 1024², single", tokens=(4608,), heads=24, columns=21504, kind="real"),
    Queries(name="FLUX.1 1024², double", tokens=(512, 4096), heads=24, columns=9216, kind="real"),
    Queries(name="FLUX.1 2048²", tokens=(16896,), heads=24, columns=21504, kind="real"),
    Queries(name="Qwen-Image", tokens=(128, 4096), heads=24, columns=9216, kind="complex"),
    Queries(name="Z-Image", tokens=(4128,), heads=30, columns=11520, kind="complex"),
    Queries(name="Wan 14B", tokens=(32760,), heads=40, columns=15360, kind="assigned", across=True),
)


@dataclass(frozen=True, slots=True)
class Attended:
    """q and k before their norm, and v [B, T, H, D]."""

    q: Inputs
    k: Inputs
    v: Tensor

    def arguments(self, which: Inputs) -> tuple[Any, ...]:
        cos, sin = ([t] for t in which.tables)
        return which.parts, which.weights, EPS, cos, sin


def main(arguments: list[str]) -> int:
    if unknown := set(arguments) - {"time", "error"}:
        print(f"unknown: {', '.join(sorted(unknown))}; there are time and error", file=sys.stderr)
        return 2
    wanted = arguments or ["error", "time"]
    if "error" in wanted:
        print("error of the output, relative: q and k normed and turned, 1024 tokens, 128 channels")
        for name, errors in error_rows():
            print(f"  {name:<28}" + "".join(f"{n} {e:.4f}   " for n, e in errors.items()))
    if "time" in wanted:
        chip = capability(torch.device("cuda")) if torch.cuda.is_available() else None
        if reason := flash3.why_not(chip, 128, torch.bfloat16, fp8=True):
            print(reason, file=sys.stderr)
            return 1
        for case in CASES:
            show_times(case)
    return 0


def error_rows() -> Iterator[tuple[str, dict[str, float]]]:
    """Compare codes made of q, k and v at leisure with those that the norm writes, on the CPU."""
    draw = torch.Generator().manual_seed(0)
    angle = 32 * torch.randn(1, 1024, 1, 64, generator=draw)
    for name in ("Gaussian", "channels that stand out", "keys with an offset", "both"):
        q, k, v = (torch.randn(1, 1024, 2, 128, generator=draw) for _ in range(3))
        if name in ("channels that stand out", "both"):
            for t in (q, k):
                t[..., [3, 40]] *= 4
        if name in ("keys with an offset", "both"):
            k += 3 * torch.randn(1, 1, 2, 128, generator=draw)
        weight = 1 + 0.3 * torch.randn(128, generator=draw)
        one = [weight], EPS, [angle.cos()], [angle.sin()], True
        normal_q, normal_k = (reference.norm_rope([t], *one) for t in (q, k))
        want, scale = exact(normal_q, normal_k, v), 128**-0.5
        (q8, q_scale), (k8, k_scale) = (reference.codes([t], *one) for t in (q, k))
        v8, v_scale = fp8.values(v)
        written = fp8.Codes(q8, k8, v8, q_scale, k_scale, v_scale)
        yield (
            name,
            {
                "of q, k, v": error(fp8.attention(normal_q, normal_k, v, scale=scale), want),
                "by the norm": error(fp8.attend(written, scale=scale), want),
            },
        )


def show_times(case: Queries) -> None:
    """Print microseconds of the whole and of its steps, and errors against exact attention."""
    from dirotq.kernels.fp8_qkv.kernel import launch, launch_values
    from dirotq.tuning.timing import copies, time_calls

    scale = case.dim**-0.5
    tokens = sum(case.tokens)
    size = 6 * tokens * case.heads * case.dim
    sets = [attended(case, seed) for seed in range(copies(size))]

    def both(x: Attended) -> tuple[Tensor, Tensor]:
        return norm_rope(*x.arguments(x.q), True), norm_rope(*x.arguments(x.k), True)

    def unfused(x: Attended, mode: str) -> Tensor:
        return engines.run(*both(x), x.v, None, scale, mode)

    def fused(x: Attended) -> Tensor:
        given = *x.arguments(x.q), *x.arguments(x.k), True, x.v.transpose(1, 2), scale
        return normed.OPERATOR(*given).transpose(1, 2)

    def written(x: Attended) -> fp8.Codes:
        v8, v_scale = launch_values(x.v)
        (q8, q_scale), (k8, k_scale) = (codes(*x.arguments(y), True) for y in (x.q, x.k))
        return fp8.Codes(q8, k8, v8, q_scale, k_scale, v_scale)

    made = [written(x) for x in sets]
    pairs = [both(x) for x in sets]
    whole: dict[str, Callable[[Attended], Tensor]] = {
        "exact": lambda x: unfused(x, "exact"),
        "FP8, codes of q, k and v": lambda x: unfused(x, "fp8"),
        "FP8, codes by the norm": fused,
    }
    want = unfused(sets[0], "exact")
    print(f"{case}; exact: {engines.choose(*pairs[0], None, None, 'exact')}")
    for name, compute in whole.items():
        off = error(compute(sets[0]), want)
        us = time_calls([lambda x=x, f=compute: f(x) for x in sets]).p50  # type: ignore[misc]
        print(f"  {name:<32}{us:9.1f} us  error {off:.4f}", flush=True)
    steps: dict[str, list[Callable[[], object]]] = {
        "norm_rope of q and k": [lambda x=x: both(x) for x in sets],  # type: ignore[misc]
        "codes of q, k and v": [
            lambda x=x, p=p: launch(*p, x.v)  # type: ignore[misc]
            for x, p in zip(sets, pairs, strict=True)
        ],
        "codes by the norm, and of v": [lambda x=x: written(x) for x in sets],  # type: ignore[misc]
        "of v alone": [lambda x=x: launch_values(x.v) for x in sets],  # type: ignore[misc]
        "of q alone": [
            lambda x=x: codes(*x.arguments(x.q), True)  # type: ignore[misc]
            for x in sets
        ],
        "FlashAttention-3": [
            lambda x=x, p=p: flash3.exact(*p, x.v, scale=scale)  # type: ignore[misc]
            for x, p in zip(sets, pairs, strict=True)
        ],
        "FlashAttention-3 FP8": [
            lambda c=c: flash3.fp8(c, scale=scale)  # type: ignore[misc]
            for c in made
        ],
    }
    for name, calls in steps.items():
        print(f"    {name:<30}{time_calls(calls).p50:9.1f} us", flush=True)


def attended(case: Queries, seed: int) -> Attended:
    """Draw q, k and v, each in columns of a wide linear."""
    q, k = inputs(case, 2 * seed), inputs(case, 2 * seed + 1)
    k = Inputs(k.parts, k.weights, q.tables)
    width = case.heads * case.dim
    wide = torch.randn(1, sum(case.tokens), 2 * width, device="cuda", dtype=torch.bfloat16)
    return Attended(q, k, wide[..., width:].unflatten(-1, (case.heads, case.dim)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
