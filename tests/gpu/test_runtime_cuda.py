"""Packed linears on a real GPU, as a network and its runtime use them."""

import pytest
import torch
from formats import inputs, random_linear, spec_of
from torch import Tensor, nn

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

formats = pytest.mark.parametrize(
    "name", ["pow2", "rms", "floats", "groups", "w4a8", "w4a16-protected"]
)


@pytest.mark.parametrize("name", ["pow2", "rms", "floats", "groups", "w4a8", "w4a16"])
@pytest.mark.parametrize("rows", [7, 600])
def test_views_are_read_as_they_lie(name, rows):
    module = random_linear(spec_of(name, 2240, 1008))
    wide = inputs(rows, 2 * 2240 + 24)
    views = {
        "columns of wider rows": wide[:, 24 : 24 + 2240],
        "every other column": wide[:, : 2 * 2240 : 2],
        "off by one": wide[:, 1:2241],
        "transposed": wide[:, :2240].T.contiguous().T,
        "one row, repeated": wide[:1, :2240].expand(rows, -1),
    }
    for what, view in views.items():
        assert torch.equal(module(view), module(view.contiguous())), what
    x = wide[:, :2240].reshape(1, rows, 2240).expand(3, -1, -1).transpose(0, 1)
    assert torch.equal(module(x), module(x.contiguous()))


@pytest.mark.parametrize("rows", [7, 600])
@pytest.mark.parametrize(
    "name", ["pow2", "rms", "floats", "token-r0", "groups", "w4a8", "w4a16-protected"]
)
def test_consumers_of_a_shared_site(name, rows):
    """Any slice of the outputs: its tensors start at odd addresses and have odd sizes."""
    module, x = random_linear(spec_of(name, 2240, 1008)), inputs(rows, 2240)
    whole = module(x)
    for part in (slice(0, 512), slice(512, 1008), slice(5, 6), slice(33, 1007)):
        got, want = module(x, rows=part).float(), whole[:, part].float()
        assert (got - want).norm() < 0.01 * want.norm(), part


@formats
@pytest.mark.parametrize("rows", [1, 33, 1024])
def test_repeated_calls_are_equal(name, rows):
    module, x = random_linear(spec_of(name, 2240, 4608)), inputs(rows, 2240)
    first = module(x)
    for _ in range(10):
        assert torch.equal(module(x), first)


@pytest.mark.parametrize("rows", [1, 33, 600])
@formats
def test_cuda_graph(name, rows):
    module = random_linear(spec_of(name, 2240, 1008))
    static = inputs(rows, 2240)
    module(static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(static)
    for seed in range(3):
        x = inputs(rows, 2240) * (seed + 1)
        static.copy_(x)
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, module(x))


class Block(nn.Module):
    """Two linears and what stands between them in a network."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.up = random_linear(spec_of(name, 1152, 4608))
        self.down = random_linear(spec_of(name, 4608, 1152))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@formats
def test_compiled_equals_eager(name):
    torch._dynamo.reset()
    block = Block(name)
    compiled = torch.compile(block, fullgraph=True)
    for rows in (33, 600, 64):
        x = inputs(rows, 1152)[None]
        assert torch.equal(compiled(x), block(x))


def test_compiled_into_cuda_graphs():
    torch._dynamo.reset()
    block, x = Block("pow2"), inputs(600, 1152)
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert torch.equal(compiled(x), block(x))


@pytest.mark.parametrize("rows", [33, 1024])
def test_two_streams_at_once(rows):
    modules = [
        random_linear(spec_of("pow2", 3072, 3072)),
        random_linear(spec_of("token", 2240, 4608)),
    ]
    data = [inputs(rows, 3072), inputs(rows, 2240)]
    want = [module(x) for module, x in zip(modules, data, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                got[i].append(modules[i](data[i]))
    torch.cuda.synchronize()
    for i, expected in enumerate(want):
        assert all(torch.equal(y, expected) for y in got[i])


def test_one_workspace_whatever_the_number_of_linears():
    modules = [random_linear(spec_of("pow2", 3072, 3072)) for _ in range(6)]
    x = inputs(1024, 3072)

    def peak(count: int) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for module in modules[:count]:
            module(x)
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before  # nothing stays behind
        return torch.cuda.max_memory_allocated() - before

    peak(1)
    assert peak(6) <= peak(1) + 2**20


def test_no_rows():
    module = random_linear(spec_of("pow2", 2240, 1008))
    assert module(inputs(16, 2240)[:0].reshape(3, 0, 2240)).shape == (3, 0, 1008)
