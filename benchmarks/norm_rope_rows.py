"""`norm_rope` of one block's queries, against its memory traffic and what Inductor makes of torch.

Letters: B batch, T tokens, H heads, D channels of a head.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from dirotq.benchmarks.speed_table import OURS, Row
from dirotq.kernels.norm_rope import reference
from dirotq.tuning.timing import Timing, copies, time_calls

EPS = 1e-6
INDUCTOR = "Inductor, of diffusers' code"


@dataclass(frozen=True, slots=True, kw_only=True)
class Queries:
    """Queries of a block, in columns of a wide linear that has ``columns``.

    tokens    of each part: text and image, or all of them
    kind      "real" (cos and sin per channel), "complex" (a number per pair), "assigned" (Wan) or
              "norm" (no rotation)
    across    whether the norm is over all heads
    """

    name: str
    tokens: tuple[int, ...]
    heads: int
    columns: int
    kind: str
    dim: int = 128
    across: bool = False
    reach: float = 1.3

    def __str__(self) -> str:
        tokens = " + ".join(map(str, self.tokens))
        return f"{self.name} {self.heads} x {self.dim}, T = {tokens}"


CASES = (
    Queries(name="FLUX single", tokens=(4608,), heads=24, columns=21504, kind="real"),
    Queries(name="FLUX double", tokens=(512, 4096), heads=24, columns=9216, kind="real"),
    Queries(name="Qwen-Image", tokens=(128, 4096), heads=24, columns=9216, kind="complex"),
    Queries(name="Z-Image", tokens=(4128,), heads=30, columns=11520, kind="complex"),
    Queries(
        name="Wan 14B", tokens=(32760,), heads=40, columns=15360, kind="assigned", across=True,
        reach=1.6,
    ),
    Queries(name="SD3.5-M", tokens=(4096, 333), heads=24, columns=4608, kind="norm", dim=64),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Inputs:
    """``parts`` [B, T, H, D], ``tables`` of all tokens: cos and sin [1, T, 1, D or D / 2]."""

    parts: list[Tensor]
    weights: list[Tensor]
    tables: tuple[Tensor | None, Tensor | None]


def rows(bandwidth: float) -> Iterator[Row]:
    """Time every case: its traffic at so many bytes per second, ours, and plain torch compiled.

    Raises RuntimeError where ours is further from float64 than twice plain torch.
    """
    for case in CASES:
        first = inputs(case, 0)
        size = traffic(first)
        many = [first, *(inputs(case, seed) for seed in range(1, copies(size // 2)))]
        if problem := wrong(case, first):
            raise RuntimeError(f"{case}: {problem}")
        floor = size / bandwidth * 1e6
        ours = time_calls([functools.partial(operator, case, one) for one in many])
        plain = torch.compile(torch_code(case), dynamic=False)
        theirs = time_calls([functools.partial(plain, one) for one in many])
        yield _row(case, "floor", Timing(floor, floor, floor), None)
        yield _row(case, OURS, ours, ours.p50 / floor)
        yield _row(case, INDUCTOR, theirs, theirs.p50 / floor)


def inputs(case: Queries, seed: int, device: str = "cuda") -> Inputs:
    """Make random queries, weights and tables of a case; real tables are in float32."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    inner = case.heads * case.dim
    parts = [
        normal(1, t, case.columns).to(torch.bfloat16)[..., :inner].unflatten(-1, (-1, case.dim))
        for t in case.tokens
    ]
    width = inner if case.across else case.dim
    weights = [(1 + 0.3 * normal(width)).to(torch.bfloat16) for _ in parts]
    if case.kind == "norm":
        return Inputs(parts, weights, (None, None))
    angle = normal(1, sum(case.tokens), 1, case.dim // 2)
    pairs = torch.view_as_real(torch.polar(torch.ones_like(angle), angle))
    tables = pairs[..., 0], pairs[..., 1]
    if case.kind != "complex":
        tables = tuple(t.repeat_interleave(2, -1) for t in tables)  # type: ignore[assignment]
    if case.kind == "assigned":
        tables = tables[0][..., 0::2], tables[1][..., 1::2]
    return Inputs(parts, weights, tables)


def traffic(given: Inputs) -> int:
    """Count bytes: queries are read and written, tables are read."""
    tables = sum(4 * t.numel() for t in given.tables if t is not None)
    return sum(4 * x.numel() for x in given.parts) + tables


def operator(case: Queries, given: Inputs) -> Tensor:
    """Return what the pass puts in a block's graph."""
    cos, sin = ([t] for t in given.tables)
    return torch.ops.dirotq.norm_rope(given.parts, given.weights, EPS, cos, sin, True)


def torch_code(case: Queries) -> Callable[[Inputs], Tensor]:
    """Return what diffusers computes, in its own order and dtypes."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        if case.across:
            return rms_norm(x.flatten(2), (weight.numel(),), weight, EPS).view(x.shape)
        return rms_norm(x, (case.dim,), weight, EPS)

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if case.kind == "complex":
            numbers = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
            turned = torch.view_as_real(numbers * torch.complex(cos, sin)).flatten(3)
            return turned.type_as(x)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        if case.kind == "real":
            across = torch.stack([-second, first], -1).flatten(3)
            return (x.float() * cos + across.float() * sin).to(x.dtype)
        out = torch.empty_like(x)
        out[..., 0::2] = first * cos - second * sin
        out[..., 1::2] = first * sin + second * cos
        return out

    def compute(given: Inputs) -> Tensor:
        x = torch.cat([norm(x, w) for x, w in zip(given.parts, given.weights, strict=True)], 1)
        cos, sin = given.tables
        return x if cos is None or sin is None else rotate(x, cos, sin)

    return compute


def wrong(case: Queries, given: Inputs) -> str | None:
    """Say by how much ours is further from float64 than twice plain torch; None if it isn't."""
    wide = Inputs([x.double() for x in given.parts], [w.double() for w in given.weights],
                  given.tables)  # fmt: skip
    cos, sin = ([t] for t in given.tables)
    true = reference.norm_rope(wide.parts, wide.weights, EPS, cos, sin, True)
    ours, plain = (
        float((y.double() - true).norm() / true.norm())
        for y in (operator(case, given), torch_code(case)(given))
    )
    return None if ours <= 2 * plain else f"relative error {ours:.2g}, plain torch {plain:.2g}"


def _row(case: Queries, who: str, t: Timing, ratio: float | None) -> Row:
    reach = case.reach if who == OURS else None
    return Row(
        op="norm_rope", case=str(case), contestant=who, us_p20=t.p20, us_p50=t.p50, us_p80=t.p80,
        ratio=ratio, reach=reach,
    )  # fmt: skip
