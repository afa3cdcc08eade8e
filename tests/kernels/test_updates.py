"""Updates of a packed linear's outputs: who makes them, and what is seen of their changes."""

import copy

import torch
from formats import DEVICE, inputs, random_linear
from listed_updates import ROWS, SHAPE, adapted, delta, part
from tiny_spec import tiny_spec

from dirotq.kernels import directions
from dirotq.kernels.appended import LIMIT
from dirotq.kernels.linear import SharedRead, SiteView


def test_changes_are_seen():
    spec = tiny_spec(**SHAPE | {"rank": 8})
    x = inputs(5, 320).double()
    linear, adapter = adapted(spec, [part(ROWS[0], 320)])
    linear(x)
    made, stamp = linear.updates.made, linear.updates.stamp()
    linear(x)
    assert linear.updates.made is made
    adapter.found[0] = adapter.found[0]._replace(scale=2.0)  # in place: graphs stay right
    again = linear(x)
    assert linear.updates.made is made and linear.updates.stamp() == stamp
    adapter.found[0] = adapter.found[0]._replace(scale=20.0)  # scales so far apart don't fit
    linear(x)
    assert linear.updates.made is not made and linear.updates.stamp() != stamp
    adapter.found[0] = adapter.found[0]._replace(scale=2.0)
    adapter.found[0].up.mul_(2)  # in place
    want = random_linear(spec)(x)
    torch.testing.assert_close(linear(x) - want, 2 * (again - want))
    adapter.found[0] = adapter.found[0]._replace(scale=torch.tensor(1.0))  # as for hot swaps
    torch.testing.assert_close(linear(x) - want, again - want)
    adapter.found[0].scale.fill_(4.0)
    torch.testing.assert_close(linear(x) - want, 4 * (again - want))


def test_scales_that_grow_are_balanced_anew(monkeypatch):
    spec = tiny_spec(**SHAPE | {"rank": 8})
    monkeypatch.setattr(directions, "capability", lambda device: 90)
    linear, adapter = adapted(spec, [part(ROWS[0], 320, scale=1.0)])
    linear.renew()
    for scale, same in ((4.0, True), (4.5, False), (1000.0, False)):
        before = linear.updates.made.down
        adapter.found[0] = adapter.found[0]._replace(scale=scale)
        linear.renew()
        assert (linear.updates.made.down is before) == same
        assert (linear.updates.made.up[:, 8:].abs() / linear.wscale <= LIMIT).all()


def test_fixed_updates_outlive_their_source_and_go_exactly():
    spec = tiny_spec(**SHAPE | {"rank": 8})
    x, kept = inputs(5, 320).double(), [part(ROWS[1], 320)]
    linear, adapter = adapted(spec, [])
    before = linear(x)
    linear.updates.fix(kept)
    want = before + x @ delta(linear, kept).T
    del adapter
    torch.testing.assert_close(linear(x), want)
    weight = linear.weight.double() - random_linear(spec).weight.double()
    torch.testing.assert_close(weight, delta(linear, kept), rtol=1e-4, atol=1e-6)
    linear.updates.release(kept)
    assert torch.equal(linear(x), before)


def test_sources_are_forgotten_with_whoever_held_them():
    spec = tiny_spec(**SHAPE | {"rank": 8})
    x = inputs(5, 320).double()
    linear, adapter = adapted(spec, [part(ROWS[0], 320)])
    with_it = linear(x)
    twin = copy.deepcopy(linear)
    assert torch.equal(twin(x), random_linear(spec)(x))  # its adapters attach as copies
    linear.adapted().attach(adapter)  # twice is once
    assert torch.equal(linear(x), with_it)
    del adapter
    assert torch.equal(linear(x), random_linear(spec)(x))


def test_views_that_share_a_read():
    spec = tiny_spec(**SHAPE | {"rank": 8})
    parts = [part(ROWS[0], 320), part(ROWS[2], 320)]
    linear, adapter = adapted(spec, parts)
    shared = SharedRead(linear, 3)
    x, plain = inputs(5, 320).double(), random_linear(spec)
    for rows in ROWS:
        view = SiteView(linear, rows, shared)
        assert (view.in_features, view.out_features) == (320, rows.stop - rows.start)
        want = plain(x)[:, rows] + x @ delta(linear, parts)[rows].T
        torch.testing.assert_close(view(x), want)
        torch.testing.assert_close(view.weight, plain.weight[rows])
        torch.testing.assert_close(view.bias, plain.bias[rows])
    assert adapter.found == parts


def test_moving_the_linear_takes_them_along():
    spec = tiny_spec(**SHAPE | {"rank": 8})
    linear, adapter = adapted(spec, [part(ROWS[0], 320)])
    linear.renew()
    linear.to("meta")
    assert linear.updates.made.down.is_meta
    assert adapter.found[0].down.device == DEVICE
