"""The Triton ``accumulate`` against its specification, on the CPU's interpreter.

Small integers keep every sum exact, so results must be equal. fp16: the interpreter has no bf16.
"""

import dataclasses

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from builds.second_moment import builds  # noqa: E402

from dirotq.kernels import second_moment as op  # noqa: E402
from dirotq.kernels.chip import capability  # noqa: E402
from dirotq.kernels.second_moment import TILE, new, reference, tiles  # noqa: E402
from dirotq.kernels.second_moment import kernel as engine  # noqa: E402
from dirotq.kernels.second_moment.kernel import TILES, launch, tma_reads  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TMA, POINTERS = TILES
TALL = dataclasses.replace(POINTERS, bm=256, bn=64)
ON = pytest.mark.parametrize(
    "config",
    [
        pytest.param(POINTERS, id="pointers"),
        pytest.param(TALL, id="tall"),
        pytest.param(
            TMA,
            id="tma",
            marks=pytest.mark.skipif(
                torch.cuda.is_available() and capability(torch.device("cuda")) not in TMA.chips,
                reason="the GPU has no tensor memory accelerator like Hopper's",
            ),
        ),
    ],
)


def activations(tokens: int, dim: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens * 1000 + dim)
    values = torch.randint(-8, 9, (tokens, dim), generator=generator)
    return values.to(DEVICE, torch.float16)


def wanted(total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    total = total.clone()
    reference.accumulate(total, x)
    return total


@ON
@pytest.mark.parametrize(("tokens", "dim"), [(1, 8), (70, 256), (64, 264), (130, 520)])
def test_adds_to_what_is_there(config, tokens, dim):
    total, x = new(dim, DEVICE), activations(tokens, dim)
    for part in (x, activations(3, dim)):
        want = wanted(total, part)
        launch(total, part, tile=config)
        assert torch.equal(total, want)


def test_channels_of_any_number():
    for dim in (1, 37, 301):
        total, x = new(dim, DEVICE), activations(40, dim)
        want = wanted(total, x)
        launch(total, x, tile=POINTERS)
        assert torch.equal(total, want)


@ON
def test_reads_nothing_beside_its_rows(config):
    wide = torch.full((50, 320), torch.nan, dtype=torch.float16, device=DEVICE)
    x = wide[5:45, 16:280]
    x.copy_(activations(40, 264))
    total = new(264, DEVICE)
    want = wanted(total, x)
    launch(total, x, tile=config)
    assert torch.equal(total, want)
    assert total.isfinite().all()


@ON
def test_columns_that_lie_apart(config):
    x = activations(264, 20).T
    total = new(264, DEVICE)
    want = wanted(total, x)
    launch(total, x, tile=config)
    assert torch.equal(total, want)


@ON
def test_no_tokens_add_nothing(config):
    total = torch.full((tiles(256), TILE, TILE), 3.0, device=DEVICE)
    launch(total, activations(0, 256), tile=config)
    assert (total == 3).all()


@triton.jit
def list_places(p_out, n, count, BLOCK: tl.constexpr):
    index = tl.minimum(tl.arange(0, BLOCK), count - 1)
    i, j = engine._tile_at(index, n)
    tl.store(p_out + 2 * index, i)
    tl.store(p_out + 2 * index + 1, j)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 60])
def test_every_tile_is_somebodys_once(n):
    count = n * (n + 1) // 2
    out = torch.full((count, 2), -1, dtype=torch.int32, device=DEVICE)
    list_places[(1,)](out, n, count, BLOCK=2048)
    assert sorted(out.tolist()) == [[i, j] for i in range(n) for j in range(i + 1)]


def test_neighbours_in_time_share_columns():
    """64 tiles in turn touch 16 blocks of columns, not 64."""
    out = torch.empty(1830, 2, dtype=torch.int32, device=DEVICE)
    list_places[(1,)](out, 60, 1830, BLOCK=2048)
    touched = [len(set(part.flatten().tolist())) for part in out[800:1440].split(64)]
    assert max(touched) <= 8 + 9 + 8


@triton.jit
def list_rows(p_out, start, BLOCK: tl.constexpr):
    index = start + tl.arange(0, BLOCK)
    tl.store(p_out + tl.arange(0, BLOCK), engine._row_of(index))


@pytest.mark.parametrize("start", [0, 1_000_000, 100_000_000])
def test_roots_are_exact(start):
    out = torch.empty(4096, dtype=torch.int32, device=DEVICE)
    list_rows[(1,)](out, start, BLOCK=4096)
    row, index = out.long(), start + torch.arange(4096, device=DEVICE)
    assert (row * (row + 1) // 2 <= index).all()
    assert ((row + 1) * (row + 2) // 2 > index).all()


def test_descriptors_need_rows_at_multiples_of_16_bytes():
    x = torch.zeros(8, 32, dtype=torch.float16)
    assert tma_reads(x)
    assert tma_reads(x[:, 8:])
    assert not tma_reads(x[:, 4:])
    assert not tma_reads(torch.zeros(8, 31, dtype=torch.float16))


@pytest.mark.parametrize(
    ("chip", "dim", "tma"), [(90, 32, True), (90, 31, False), (80, 32, False), (103, 32, False)]
)
def test_the_configuration_follows_chip_and_address(chip, dim, tma, monkeypatch):
    monkeypatch.setattr(engine, "capability", lambda device: chip)
    assert engine._chosen(torch.zeros(8, dim, dtype=torch.float16)).tma is tma


def test_a_gpu_takes_the_kernel_for_16_bits_and_says_if_it_cannot(monkeypatch):
    class OnGpu:
        ndim, shape, device = 2, (3, 256), torch.device("cuda")

        def __init__(self, size: int) -> None:
            self.element_size = lambda: size

    taken, said = [], []
    monkeypatch.setattr(engine, "launch", lambda *_: taken.append("kernel"))
    monkeypatch.setattr(reference, "accumulate", lambda *_: taken.append("reference"))
    monkeypatch.setattr(op, "say_once", lambda message, level: said.append(message))
    for chip, size in ((90, 2), (90, 4), (70, 2)):
        monkeypatch.setattr(op, "capability", lambda device, chip=chip: chip)
        op.accumulate(new(256), OnGpu(size))
    assert taken == ["kernel", "reference", "reference"]
    assert len(said) == 1
    assert "compute capability 7.0" in said[0]


def test_builds_cover_every_configuration():
    names = {build.name for build in builds()}
    assert len(names) == len(builds()) == 2 * len(TILES) + 1
    assert all(build.tensor_core for build in builds())
