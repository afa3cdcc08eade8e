"""What people put around, inside or in the place of a packed network's modules has its say."""

import copy
import re
from collections import Counter
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from diffusers.hooks import ModelHook as DiffusersHook
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)
from tiny_offload import NETWORKS, call, original
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from dirotq.kernels.linear import PointwiseView, QuantLinear, SiteView
from dirotq.runtime.as_made import Made

VIEWS = SiteView, PointwiseView
PACKED = QuantLinear, *VIEWS
FUSED = ("flux", "pixart", "sana", "sd3")
DISPATCHING = ("flux", "flux2", "qwen_image", "z_image", "wan", "discovered")
"""Families whose attention processors let diffusers choose a backend."""


@contextmanager
def counted(made: nn.Module, names: list[str] | None = None):
    """Calls of modules by name, seen by forward hooks."""
    fired: Counter[str] = Counter()
    modules = dict(made.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda *_, name=name: fired.update([name]))
        for name in (modules if names is None else names)
    ]
    try:
        yield fired
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", NETWORKS)
def test_every_hook_of_a_user_fires(plain_network, name):
    """All at once, and those of packed linears each alone: as often as in diffusers' network."""
    packed, want = plain_network(name)
    unpacked = original(name)
    with counted(unpacked) as theirs:
        call(unpacked, name)
    with counted(packed) as ours:
        assert torch.equal(call(packed, name), want)
    assert {n: ours[n] for n in theirs} == theirs
    modules = dict(packed.named_modules())
    for one in (n for n in theirs if isinstance(modules[n], PACKED)):
        with counted(packed, [one]) as ours:
            assert torch.equal(call(packed, name), want)
        assert ours[one] == theirs[one], one


@pytest.mark.parametrize("name", NETWORKS)
def test_another_module_in_a_linears_place_runs(plain_network, name):
    """One linear of each name: blocks of a kind have the same."""
    packed, want = plain_network(name)
    views = {
        re.sub(r"\d+", "i", one): one for one, m in packed.named_modules() if isinstance(m, VIEWS)
    }
    assert views
    for one in views.values():
        parent, _, leaf = one.rpartition(".")
        twin, calls = copy.deepcopy(packed), []

        class Other(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                calls.append(1)  # noqa: B023 - called before the next turn
                return self.inner(x)

        owner = twin.get_submodule(parent)
        setattr(owner, leaf, Other(getattr(owner, leaf)))
        assert torch.equal(call(twin, name), want)
        assert calls == [1], one


@pytest.mark.parametrize("name", FUSED)
def test_hooks_of_all_modules_see_every_call(plain_network, name):
    packed, want = plain_network(name)
    seen: Counter[type] = Counter()
    hook = register_module_forward_hook(lambda module, *_: seen.update([type(module)]))
    try:
        assert torch.equal(call(packed, name), want)
    finally:
        hook.remove()
    with counted(packed) as fired:
        call(packed, name)
    modules = dict(packed.named_modules())
    assert seen == sum((Counter({type(modules[n]): fired[n]}) for n in fired), Counter())


@pytest.mark.parametrize("name", FUSED)
def test_parametrized_tensors_are_read(plain_network, name):
    packed, want = plain_network(name)

    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    fused = copy.deepcopy(packed)
    for module in list(fused.modules()):
        if isinstance(module, QuantLinear) and module.wscale.dtype == torch.bfloat16:
            parametrize.register_parametrization(module, "wscale", Doubled(), unsafe=True)
    apart = copy.deepcopy(packed)
    for module in apart.modules():
        if isinstance(module, QuantLinear) and module.wscale.dtype == torch.bfloat16:
            module.wscale.mul_(2)
    got = call(fused, name)
    assert not torch.equal(got, want)
    assert torch.equal(got, call(apart, name))


def untouched(module: nn.Module) -> bool:
    """Whether a call of it, inside of another module, is its class's forward and nothing else."""
    return Made((nn.Module(), module), (nn.Module, type(module)), ((), ())).inside()


class Nothing(ModelHook):
    """A hook of accelerate that leaves everything as it is."""


@pytest.mark.parametrize("kind", ["accelerate", "diffusers", "torch", "by hand"])
def test_a_module_is_untouched_again_once_its_hook_is_gone(kind):
    block = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
    made = Made.now(block)
    assert made.inside() and untouched(block[0])
    if kind == "accelerate":
        add_hook_to_module(block[0], Nothing())
    elif kind == "diffusers":
        HookRegistry.check_if_exists_or_initialize(block[0]).register_hook(DiffusersHook(), "it")
    elif kind == "torch":
        handle = block[0].register_forward_pre_hook(lambda *_: None)
    else:
        block[0].forward = lambda x: x
    assert not made.inside() and not untouched(block[0])
    assert untouched(block) and untouched(block[1])
    if kind == "accelerate":
        remove_hook_from_module(block[0])
    elif kind == "diffusers":
        block[0]._diffusers_hook.remove_hook("it")
    elif kind == "torch":
        handle.remove()
    else:
        del block[0].forward
    assert made.inside() and untouched(block[0])


def test_what_wraps_the_module_itself_is_not_inside():
    block = nn.Sequential(nn.Linear(4, 4))
    made = Made.now(block)
    add_hook_to_module(block, Nothing())
    assert made.inside() and not untouched(block)


def test_other_modules_and_classes_inside_are_noticed():
    block = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.SiLU())
    made = Made.now(block)
    linear = block[0][0]
    block[0][0] = copy.deepcopy(linear)
    assert not made.inside()
    block[0][0] = linear
    assert made.inside()
    block.add_module("more", nn.SiLU())
    assert not made.inside()
    del block.more
    parametrize.register_parametrization(linear, "bias", nn.SiLU())
    assert not made.inside()


def test_a_deep_copy_watches_the_copy():
    block = nn.Sequential(nn.Linear(4, 4))
    block.made = Made.now(block)
    twin = copy.deepcopy(block)
    assert twin.made.inside()
    twin[0].forward = lambda x: x
    assert not twin.made.inside()
    assert block.made.inside()


@pytest.fixture
def backends(monkeypatch):
    """Names of the backends that diffusers calls, in order."""
    called: list[str] = []
    functions = dict(_AttentionBackendRegistry._backends)

    def spy(backend: AttentionBackendName) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            called.append(backend.value)
            return functions[backend](*args, **kwargs)

        return run

    for backend in (AttentionBackendName.NATIVE, AttentionBackendName._NATIVE_MATH):
        monkeypatch.setitem(_AttentionBackendRegistry._backends, backend, spy(backend))
    # A network's backend is everyone's: put back what was.
    monkeypatch.setattr(
        _AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend
    )
    return called


def by_context(made: Any, name: str) -> torch.Tensor:
    with attention_backend("_native_math"):
        return call(made, name)


def by_network(made: Any, name: str) -> torch.Tensor:
    made.set_attention_backend("_native_math")
    return call(made, name)


def by_environment(made: Any, name: str) -> torch.Tensor:
    # What DIFFUSERS_ATTN_BACKEND does when diffusers is imported.
    _AttentionBackendRegistry._active_backend = AttentionBackendName("_native_math")
    return call(made, name)


@pytest.mark.parametrize(
    ("name", "choose"),
    [(name, by_context) for name in DISPATCHING]
    + [("flux", by_network), ("wan", by_network), ("flux", by_environment)],
)
def test_an_attention_backend_is_obeyed(plain_network, backends, name, choose):
    packed, want = plain_network(name)
    theirs = original(name)
    backends.clear()  # of the plain network's call, where this test is the first to ask for it
    call(theirs, name)
    attentions = len(backends)
    assert attentions
    backends.clear()
    twin = copy.deepcopy(packed)
    got = choose(twin, name)
    assert backends == ["_native_math"] * attentions
    assert (got - want).norm() < 0.05 * want.norm()  # a code may round the other way


# Of Wan's linears only those stay in 16 bits that diffusers casts in no network.
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "wan"])
def test_layerwise_casting_leaves_packed_tensors_alone(plain_network, name):
    """What diffusers casts are the linears that stayed in 16 bits: as if rounded beforehand."""
    packed, want = plain_network(name)
    cast, rounded = copy.deepcopy(packed), copy.deepcopy(packed)
    cast.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    names = [n for n, m in cast.named_modules() if "_diffusers_hook" in vars(m)]
    held = [t for n in names for t in cast.get_submodule(n).parameters()]
    assert {t.dtype for t in held} == {torch.float8_e4m3fn}
    for part in names:
        for tensor in rounded.get_submodule(part).parameters():
            tensor.data = tensor.data.to(torch.float8_e4m3fn).float()
    got = call(cast, name)
    assert not torch.equal(got, want)
    assert torch.equal(got, call(rounded, name))
    for path, module in cast.named_modules():
        if isinstance(module, QuantLinear):
            before = packed.get_submodule(path).state_dict()
            assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items()), path


@pytest.mark.parametrize("name", FUSED)
def test_a_hook_of_an_attention_sees_what_diffusers_gives_it(plain_network, name):
    """And not what sharing has made of that."""
    unpacked, twin = original(name), copy.deepcopy(plain_network(name)[0])
    shapes: dict[nn.Module, list[Any]] = {unpacked: [], twin: []}
    for made, seen in shapes.items():

        def look(_: Any, args: Any, kwargs: Any, seen: list[Any] = seen) -> None:
            given = [*args, *kwargs.values()]
            seen.append([tuple(t.shape) for t in given if isinstance(t, torch.Tensor)])

        for path, module in made.named_modules():
            if path.endswith((".attn", ".attn1")):
                module.register_forward_pre_hook(look, with_kwargs=True)
        call(made, name)
    assert shapes[twin] and shapes[twin] == shapes[unpacked]
