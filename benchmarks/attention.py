"""Attention on a GPU: torch's exact one against ours in 8 bits.

usage: python benchmarks/attention.py [--cases TEXT]

Prints a table: microseconds, TFLOP/s (of 4 T S hd a head; what else is done is not counted) and the
relative error against attention in float32. ``fp8`` includes the making of codes, ``codes`` is that
alone, ``product`` the rest.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dirotq.benchmarks.gpu_timing import copies, time_calls
from dirotq.kernels.attention import attention, why_not
from dirotq.kernels.chip import capability

HEAD = 500
"""Rows of q whose float32 attention is computed for the error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """B = 1; as many queries as keys."""

    name: str
    tokens: int
    heads: int
    d: int

    def __str__(self) -> str:
        return f"{self.name}, {self.heads} heads, {self.tokens} tokens, hd {self.d}"


CASES = (
    Case(name="FLUX 1024", tokens=4608, heads=24, d=128),
    Case(name="FLUX 512", tokens=1536, heads=24, d=128),
    Case(name="FLUX 2048", tokens=16896, heads=24, d=128),
    Case(name="PixArt 1024", tokens=4096, heads=16, d=72),
)


def qkv(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 views of one fused projection: gaussian, k and v with an offset per channel."""
    g = torch.Generator("cuda").manual_seed(seed)
    shape = 1, case.tokens, 3, case.heads, case.d
    fused = torch.randn(shape, generator=g, device="cuda")
    fused[:, :, 1] += 3 * torch.randn(shape[3:], generator=g, device="cuda")
    fused[:, :, 2] += 0.3 * torch.randn(shape[3:], generator=g, device="cuda")
    q, k, v = fused.bfloat16().unbind(2)
    return q, k, v


def wanted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the first HEAD queries in float32, [1, HEAD, H, hd]."""
    q, k, v = (t.float().transpose(1, 2) for t in (q[:, :HEAD], k, v))
    p = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1)
    return (p @ v).transpose(1, 2)


def error(got: Tensor, want: Tensor) -> float:
    return float((got[:, :HEAD].float() - want).norm() / want.norm())


def row(name: str, case: Case, us: float, loss: float | None) -> None:
    rate = 4 * case.heads * case.tokens**2 * case.d / us / 1e6
    shown = "" if loss is None else f"{loss:.5f}"
    print(f"  {name:<34}{us:>10.1f}{rate:>10.0f}{shown:>10}", flush=True)


def measure(case: Case) -> None:
    """Print the case's rows."""
    size = 3 * 2 * case.tokens * case.heads * case.d
    inputs = [qkv(case, seed) for seed in range(min(8, copies(size)))]
    want = wanted(*inputs[0])
    print(f"\n{case}\n  {'':<34}{'us':>10}{'TFLOP/s':>10}{'error':>10}")

    def timed(call: Callable[..., object], arguments: list) -> float:
        return time_calls([lambda a=a: call(*a) for a in arguments]).p50

    row("exact", case, timed(attention, inputs), error(attention(*inputs[0]), want))
    if reason := why_not(capability(torch.device("cuda", torch.cuda.current_device())), case.d):
        print(f"  {reason}")
        return
    from dirotq.kernels.attention.kernel import attend, quantized, usual

    scale, tile = case.d**-0.5, usual(capability(inputs[0][0].device))
    row("codes", case, timed(lambda *a: quantized(*a, scale=scale), inputs), None)
    codes = [(quantized(*a, scale=scale), torch.empty_like(a[0])) for a in inputs]
    row("product", case, timed(lambda c, y: attend(c, y, case.tokens, tile), codes), None)
    us = timed(lambda *a: attention(*a, mode="fp8"), inputs)
    row("fp8", case, us, error(attention(*inputs[0], mode="fp8"), want))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default="", help="only those whose name has this in it")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    for case in CASES:
        if options.cases.lower() in case.name.lower():
            measure(case)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
