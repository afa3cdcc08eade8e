"""Gradients by sites, block by block: against what the output does when all sites are off."""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from tiny_transformers import UNTABLED, made
from tiny_transformers.proof import found
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._pytree import tree_leaves

from dirotq.calibrate import adjoint
from dirotq.calibrate.adjoint import Adjoint
from dirotq.errors import UnsupportedError

STEP, APART = 1e-3, 0.01
"""Of the derivative by differences, and its relative error: parts of networks compute in float32,
whose rounding is divided by the step."""
ROUNDED = {"Kandinsky5Transformer3DModel", "SanaWMTransformer3DModel"}
"""Parts of them compute in bfloat16."""
WITHOUT = {"HiDreamImageTransformer2DModel"}
"""Its experts compute without gradients."""


TWICE = "twice "
"""Before a site's name: off by twice as much."""


class WholeReplay:
    """A replay's interface to a network whose weights are all in memory."""

    def __init__(self, network, blocks):
        self.transformer, self.blocks, self.device = network, blocks, torch.device("cpu")
        self.current, self.outputs, self.graphs = 0, [], False

    def forward(self, inputs):
        with torch.set_grad_enabled(self.graphs):
            made = [t for t in tree_leaves(self.transformer(**inputs)) if torch.is_tensor(t)]
        return torch.cat([each.flatten() for each in made])

    def steps(self, calls, first):
        self.outputs = []
        for self.current, call in enumerate(calls, first):
            self.outputs.append(self.forward(call))
        yield SimpleNamespace(run=lambda: None)

    def loaded(self, blocks):
        yield from blocks


def off_by(module, shape):
    """The same for each call of a linear: random, from its name."""
    seed = sum(map(ord, module)) + sum(shape)
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def watching(network, sites):
    @contextmanager
    def watch(block, add):
        with ExitStack() as hooks:
            for site in sites:
                for linear in site.linears if site.block == block else ():

                    def tell(_, args, y, linear=linear, name=site.name):
                        seen = y if y.requires_grad else y.detach().requires_grad_()
                        off = off_by(linear, y.shape)
                        add(name, seen, off)
                        add(TWICE + name, seen, 2 * off)
                        return seen.clone()

                    hook = network.get_submodule(linear).register_forward_hook(tell)
                    hooks.callback(hook.remove)
            yield

    return watch


def moved_by_all(replay, inputs, sites, scale):
    """The output when each linear of each site is off by ``scale`` times its error."""
    with ExitStack() as hooks:
        for site in sites:
            for linear in site.linears:
                module = replay.transformer.get_submodule(linear)
                hook = module.register_forward_hook(
                    lambda _, args, y, linear=linear: y + scale * off_by(linear, y.shape)
                )
                hooks.callback(hook.remove)
        return replay.forward(inputs)


def summed(moved, sites):
    """Products of all sites together; twice as large where each is off by twice as much."""
    names = {site.name for site in sites} & moved.keys()
    assert moved.keys() == names | {TWICE + name for name in names}
    for name in names:
        torch.testing.assert_close(moved[TWICE + name], 2 * moved[name], rtol=1e-5, atol=0)
    return sum(moved[name] for name in names)[0]


def prepared(name):
    network, inputs = made(name)
    network.requires_grad_(False)
    sites = [site for site in found(network, inputs).sites if site.kind == "block"]
    blocks = tuple(dict.fromkeys(site.block for site in sites if site.block))
    return WholeReplay(network, blocks), inputs, sites


@pytest.mark.parametrize("name", [name for name in UNTABLED if name not in WITHOUT])
def test_sums_over_sites_are_a_directional_derivative(name):
    replay, inputs, sites = prepared(name)
    step, apart = (10 * STEP, 10 * APART) if name in ROUNDED else (STEP, APART)
    ahead, behind = (moved_by_all(replay, inputs, sites, s) for s in (step, -step))
    passes = Adjoint(replay, 2)
    moved, sizes = passes.disturbed([inputs], 3, watching(replay.transformer, sites), "a test")
    assert sizes == [ahead.numel()]
    want = torch.stack(passes._drawn(ahead, 3)) @ ((ahead - behind) / (2 * step))
    assert (summed(moved, sites) - want).norm() < apart * want.norm()


class OneWay(torch.autograd.Function):
    """An operation that nobody wrote the gradients of."""

    @staticmethod
    def forward(ctx, x):
        return x.sin()


class Opaque(nn.Module):
    """Has such an operation inside of its block, or behind it."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh())]).double()
        self.blocks[0].register_forward_hook(lambda _, args, y: OneWay.apply(y) if inside else y)

    def forward(self, x):
        made = self.blocks[0](x)
        return made if self.inside else OneWay.apply(made)


@pytest.mark.parametrize("inside", [True, False])
def test_what_has_no_gradients_here_is_refused(inside):
    replay = WholeReplay(Opaque(inside).requires_grad_(False), ("blocks.0",))
    sites = [SimpleNamespace(name="blocks.0", block="blocks.0", linears=("blocks.0.0",))]
    inputs = {"x": torch.ones(2, 4, dtype=torch.float64)}
    with pytest.raises(UnsupportedError, match=r"^Opaque has no gradients .*sensitive=null"):
        Adjoint(replay, 2).disturbed([inputs], 3, watching(replay.transformer, sites), "a test")


def test_flex_attention_has_gradients_on_a_cpu_inside_alone():
    x = torch.randn(1, 1, 16, 16, dtype=torch.float64, requires_grad=True)

    def attended(attention):
        return torch.autograd.grad(attention(x, x, x).sin().sum(), x)[0]

    with adjoint._differentiable(nn.Identity()):
        found = attended(flex_attention)
    torch.testing.assert_close(found, attended(nn.functional.scaled_dot_product_attention))
    with pytest.raises(UnsupportedError), adjoint._differentiable(nn.Identity()):
        raise NotImplementedError
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        flex_attention(x, x, x)


class Writes(nn.Module):
    """Writes to what it gave to a block, and to what the block returned; has a linear outside."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4).double()
        blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)]
        self.blocks = nn.ModuleList(blocks).double()

    def forward(self, x):
        given = self.blocks[0](self.first(x))
        made = self.blocks[1](given)
        given.mul_(2)
        return made.add_(1) * given.sin()


@pytest.mark.parametrize("park", [False, True])
def test_a_network_may_write_to_its_tensors(park):
    replay = WholeReplay(Writes().requires_grad_(False), ("blocks.0", "blocks.1"))
    sites = [SimpleNamespace(name=b, block=b, linears=(f"{b}.0",)) for b in replay.blocks]
    sites.append(SimpleNamespace(name="first", block="", linears=("first",)))
    inputs = {"x": torch.ones(2, 4, dtype=torch.float64)}
    ahead, behind = (moved_by_all(replay, inputs, sites, s) for s in (STEP, -STEP))
    passes = Adjoint(replay, 2)
    passes.park = park
    moved, _ = passes.disturbed([inputs], 0, watching(replay.transformer, sites), "a test")
    want = torch.stack(passes._drawn(ahead, 0)) @ ((ahead - behind) / (2 * STEP))
    assert moved.keys() >= {"first", *replay.blocks}
    assert (summed(moved, sites) - want).norm() < 1e-4 * want.norm()
