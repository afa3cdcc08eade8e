"""Every engine's launches, recorded and repeated on other tensors, bit for bit as they ran before.

The interpreter stands for compiled kernels: given addresses, it reads and writes there.
"""

import ctypes
import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from formats import DEVICE, random_linear
from tiny_spec import tiny_spec
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton")

from dirotq.kernels import engine, recorder
from dirotq.kernels.build import Config
from dirotq.kernels.plan import candidates_for
from dirotq.kernels.prologue import concat_gelu, gelu, plain

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/gpu has real launches")
HALF = torch.float16
ROWS = 3
SHAPE = {"dim": 320, "rows": (48,), "block": 16, "act_group": 64, "weight_group": 64}
SPECS = {
    "pow2": tiny_spec(**SHAPE, rank=24, act_scale="pow2"),
    "rms": tiny_spec(**SHAPE | {"act_group": 16}, rank=24, act_scale="rms"),
    "w4a8": tiny_spec(**SHAPE, rank=8, act_bits=8),
    "groups": tiny_spec(**SHAPE, rank=8, act_scale="group", weight_scale="group"),
    "w4a16": tiny_spec(**SHAPE | {"block": 1}, act_bits=16, weight_scale="group"),
}


class Interpreted:
    """A kernel that returns, as Triton's do, what can be launched with addresses: itself."""

    def __init__(self, kernel) -> None:
        self.kernel, self.arg_names = kernel, kernel.arg_names
        self.dtypes: list[torch.dtype | None] = []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            with _disable_current_modes():  # the interpreter's own operators are no kernel's
                self.kernel[grid](*arguments, **constants)
            values = iter(arguments)
            given = [None if n in constants else next(values) for n in self.arg_names]
            self.dtypes = [value.dtype if isinstance(value, Tensor) else None for value in given]
            return SimpleNamespace(run=self, function=None, packed_metadata=None)

        return launch

    def __call__(self, *arguments):
        self.launch(*arguments)

    def launch(self, x, y, z, stream, function, metadata, launch, enter, leave, *arguments):
        repeated.append(self.kernel)
        self.kernel[x, y, z](*map(at_address, arguments, self.dtypes))


repeated: list = []
"""Kernels that were launched by their addresses."""


def at_address(value, dtype: torch.dtype | None):
    if dtype is None:
        return value
    memory = (ctypes.c_byte * 16).from_address(value)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    real = Config.launch

    def launch(self, grid, *arguments):
        real(replace(self, kernel=Interpreted(self.kernel)), grid, *arguments)

    monkeypatch.setattr(Config, "launch", launch)
    repeated.clear()
    recorder.forget()
    yield
    recorder.forget()


def plans(name: str) -> list:
    """The first plan of each engine and kind of tile that takes no descriptors."""
    found = {}
    for plan in candidates_for(90, ROWS, 48, SPECS[name], torch.bfloat16):
        if not getattr(plan.tile, "tma", False):
            key = f"{name}-{plan.engine}-{getattr(plan.tile, 'kind', '')}"
            found.setdefault(key, pytest.param(name, plan, id=key))
    return list(found.values())


def repeated_and_computed(name, plan, make, read, rows=slice(None)):
    """y of a call that repeats the launches of another, and y of the same as it is computed.

    make  draws (x, behind); read: makes them a prologue
    """
    spec = SPECS[name]
    packed = random_linear(spec).packed()

    def call(inputs, packed):
        some = replace(spec, out_features=(len(packed.qweight[rows]),))
        return engine.linear(plan, read(*inputs), packed.rows(rows), some)

    call(make(), packed)  # the first product of a process makes tensors of its own
    repeated.clear()
    for number in range(2):
        made = make()
        moved = type(packed)(*(None if t is None else t.clone() for t in packed))
        got = recorder.recorded("", (*made, *moved), functools.partial(call, made, moved))
        assert bool(repeated) == bool(number)
    return got, call(made, packed)


@pytest.mark.parametrize(("name", "plan"), [case for name in SPECS for case in plans(name)])
def test_every_engine(name, plan):
    torch.manual_seed(1)
    make = lambda: (torch.randn(1, ROWS, 320, dtype=HALF), None)  # noqa: E731
    got, want = repeated_and_computed(name, plan, make, lambda x, _: plain(x))
    assert got.dtype == HALF
    assert torch.equal(got, want)


@pytest.mark.parametrize("read", [gelu, concat_gelu], ids=["gelu", "concat"])
@pytest.mark.parametrize(
    ("name", "plan"), [plans("rms")[0], plans("pow2")[1]], ids=["rms-scaled_mm", "pow2-packed"]
)
def test_prologues_of_slices_and_some_outputs(name, plan, read):
    """x and what lies behind it are columns of one tensor: neither owns its memory."""

    def make():
        wide = torch.randn(2, ROWS, 384, dtype=HALF)
        return (wide[..., 64:], None) if read is gelu else (wide[..., :256], wide[..., 256:320])

    first = (lambda x, _: gelu(x)) if read is gelu else read
    got, want = repeated_and_computed(name, plan, make, first, slice(16, 48))
    assert got.shape == (2 * ROWS, 32)
    assert torch.equal(got, want)
