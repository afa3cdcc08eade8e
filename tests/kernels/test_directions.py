"""Directions made of updates: exact as plain products, and in every kernel's branch."""

from dataclasses import replace

import pytest
import torch
from formats import DEVICE, FORMATS, inputs, random_linear, spec_of
from listed_updates import ROWS, SHAPE, adapted, delta, part
from scaled_mm import emulated
from tiny_spec import FP4, tiny_spec

from dirotq.kernels import directions, engine
from dirotq.kernels.appended import LIMIT
from dirotq.kernels.directions import Part
from dirotq.kernels.plan import Plan, candidates_for, takes_directions


@pytest.mark.parametrize("name", FORMATS)
def test_exact_in_float64(name):
    """Two adapters on shared rows, one of them on a part; equal downs; scales of either sign."""
    spec = spec_of(name, 512, 96)
    parts = [part(rows, 512) for rows in ROWS]
    parts += [part(ROWS[1], 512, rank=3, scale=-2.0, seed=9)]
    parts += [Part(rows, parts[0].down, part(rows, 512, seed=5).up, 1.0) for rows in ROWS[1:]]
    x = inputs(5, 512).double()
    want = random_linear(spec)(x) + x @ delta(random_linear(spec), parts).T
    linear, adapter = adapted(spec, parts)
    assert (linear(x) - want).norm() <= 1e-10 * want.norm()
    assert linear.updates.made.down.shape == (512, 4 + 4 + 4 + 3)
    for rows in ROWS:
        got = linear(x, rows=rows)
        assert (got - want[:, rows]).norm() <= 1e-10 * want.norm()
    adapter.found = []
    assert torch.equal(linear(x), random_linear(spec)(x))


def wide(monkeypatch, spec, parts: list[Part]):
    """A linear and its directions as kernels take them, on a CPU as well."""
    monkeypatch.setattr(directions, "capability", lambda device: 90)
    linear, adapter = adapted(spec, parts)
    linear.renew()
    made = linear.updates.made
    assert made.down.dtype == made.up.dtype == torch.bfloat16
    packed = linear.packed()._replace(basis=made.down, wp=made.up)
    return linear, adapter, packed, replace(spec, rank=packed.rank)


ENGINES = {
    "pow2": ({"rank": 24, "act_scale": "pow2"}, ("scaled_mm", "packed", "unpacked")),
    "rms": ({"rank": 24, "act_scale": "rms"}, ("scaled_mm", "packed")),
    "rms, nothing protected": ({"act_scale": "rms"}, ("scaled_mm", "unpacked")),
    "token": ({"rank": 8}, ("packed",)),
    "groups": ({"rank": 8, "act_scale": "group", "weight_scale": "group"}, ("packed",)),
    "w4a16": ({"act_bits": 16, "weight_scale": "group"}, ("w4a16",)),
    "w4a16, protected": ({"act_bits": 16, "weight_scale": "group", "rank": 8}, ("w4a16",)),
    "mxfp4": ({"rank": 8, **FP4["mxfp4"]}, ("fp4",)),
}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        pytest.param(c, name, id=f"{n}-{name}")
        for n, (c, names) in ENGINES.items()
        for name in names
    ],
)
def test_every_engine_takes_them(monkeypatch, changes, name):
    pytest.importorskip("triton")
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch, "_scaled_mm", emulated)
    spec = tiny_spec(**SHAPE | changes)
    parts = [part(rows, 320, scale=3.0, dtype=torch.bfloat16) for rows in ROWS[:2]]
    linear, _, packed, wider = wide(monkeypatch, spec, parts)
    x = inputs(40, 320, torch.float16)
    plan = next(
        p for p in candidates_for(90, 40, 96, spec, torch.bfloat16) if p.engine == name
    )  # fmt: skip
    base = engine.reference(x.double(), linear.packed(), spec)
    added = x.double() @ delta(linear, parts).T
    rounding = engine.reference(x, linear.packed(), spec).double() - base
    got = engine.linear(plan, x, packed, wider, len(parts) * 4).double() - base - added
    assert got.norm() < 2 * rounding.norm() + 2.0**-8 * (base + added).norm()
    assert got.norm() < 0.1 * added.norm()


@pytest.mark.parametrize("act_scale", ["pow2", "rms"])
@pytest.mark.parametrize("rank", [50, 85])
def test_many_directions_beside_few(monkeypatch, act_scale, rank):
    """More than are projected out in the kernels, and more than they compute at all."""
    spec = tiny_spec(**SHAPE | {"rank": 24, "act_scale": act_scale})
    parts = [part(rows, 320, rank=rank, dtype=torch.bfloat16) for rows in ROWS]
    linear, _, packed, wider = wide(monkeypatch, spec, parts)
    x = inputs(40, 320, torch.float16)
    plan = next(
        p for p in candidates_for(90, 40, 96, spec, torch.float16) if p.engine == "packed"
    )  # fmt: skip
    want = engine.reference(x.double(), linear.packed(), spec) + x.double() @ delta(linear, parts).T
    got = engine.linear(plan, x, packed, wider, 3 * rank).double()
    assert (got - want).norm() < 0.02 * want.norm()


def test_where_no_kernel_runs_they_are_added_in_torch(monkeypatch):
    """The whole branch in bfloat16, and an input that only the specification takes."""
    spec = tiny_spec(**SHAPE | {"rank": 24, "act_scale": "pow2"})
    parts = [part(rows, 320, dtype=torch.bfloat16) for rows in ROWS]
    linear, _, packed, wider = wide(monkeypatch, spec, parts)
    x, plan = inputs(5, 320).double(), Plan(engine="reference", container="none")
    want = engine.reference(x, linear.packed(), spec) + x @ delta(linear, parts).T
    got = engine.linear(plan, x, packed, wider, 12)
    assert (got - want).norm() < 2.0**-8 * want.norm()
    linear.renew()
    assert torch.equal(linear(x), got)  # by the operator


def test_which_linears_kernels_take_them():
    spec = tiny_spec(rank=8)
    assert takes_directions(90, spec, 56)
    assert not takes_directions(90, spec, 57)  # more than there are channels
    assert not takes_directions(None, spec, 1)
    assert not takes_directions(90, tiny_spec(rank=8, transform="dense"), 1)
    assert not takes_directions(90, replace(spec, branch=replace(spec.branch, bits=8)), 1)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_powers_of_two_keep_what_fp8_columns_hold(monkeypatch, size):
    spec = tiny_spec(**SHAPE | {"rank": 8})
    one = part(ROWS[0], 320)
    one = one._replace(up=one.up * size, scale=1.0)
    linear, _, packed, _ = wide(monkeypatch, spec, [one])
    down, up = (t[:, 8:].double() for t in (packed.basis, packed.wp))
    ratio = (up.abs() / linear.wscale.double()).amax(0)
    assert (ratio <= LIMIT / 4).all()
    change = delta(linear, [one])
    assert (up @ down.T - change).norm() < 2.0**-7 * change.norm()
    balance = ratio / down.norm(dim=0)
    if size == 1e4:  # the limit binds
        assert ((ratio > LIMIT / 8) & (balance < 0.1)).all()
    else:
        assert ((balance > 0.1) & (balance < 0.6)).all()  # a quarter, up to a factor of two


def test_rows_without_a_scale_are_no_columns(monkeypatch):
    spec = tiny_spec(**SHAPE | {"rank": 8})
    monkeypatch.setattr(directions, "capability", lambda device: 90)
    linear, _ = adapted(spec, [part(ROWS[0], 320)])
    linear.wscale[3] = 0
    linear.renew()
    assert linear.updates.made.down.dtype == torch.float64
    assert linear.updates.made.down.shape == (320, 4)
    linear.updates.forget_made()
    linear.wscale[3] = 1
    linear.wscale[60] = 0  # no row of the update
    linear.renew()
    assert linear.updates.made.down.dtype == torch.bfloat16


def test_equal_downs_are_stored_once_where_rows_differ():
    spec = tiny_spec(**SHAPE | {"rank": 8})
    first = part(ROWS[0], 320)
    again = [Part(rows, first.down.clone(), part(rows, 320).up, 1.0) for rows in ROWS[1:]]
    linear, adapter = adapted(spec, [first, *again])
    linear.renew()
    assert linear.updates.made.down.shape == (320, 4)
    adapter.found.append(part(ROWS[0], 320)._replace(down=first.down))
    linear.renew()
    assert linear.updates.made.down.shape == (320, 8)
