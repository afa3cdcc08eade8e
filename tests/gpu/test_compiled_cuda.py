"""Compiled blocks on a real GPU against the same packed network module by module."""

import copy
import logging
from typing import Any

import pytest
import torch
from formats import spec_of
from packed_flux import arguments, build, run
from tiny_families import TINY
from tiny_packed import packed
from tiny_spec import tiny_spec
from torch import Tensor

import dirotq
from dirotq.models.call import Call
from dirotq.models.families import family_of
from dirotq.packed.swap import swap_sites
from dirotq.runtime import compiled

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def network():
    return build()


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()


def exact(network: Any, call: dict[str, Any]) -> Tensor:
    """In float64, which computes the specification."""
    double = copy.deepcopy(network).cpu().double()
    inputs = {k: v.cpu().double() if torch.is_tensor(v) else v for k, v in call.items()}
    return run(double, **inputs)


def error(network: Any, call: dict[str, Any], want: Tensor) -> float:
    return float((run(network, **call).cpu().double() - want).norm() / want.norm())


def compilations() -> int:
    return sum(torch._dynamo.utils.counters["aot_autograd"].values())


@pytest.mark.parametrize(("tokens", "batch"), [(64, 1), (101, 3), (1000, 2)])
def test_as_exact_as_module_by_module(network, tokens, batch):
    call = arguments(1, tokens, batch)
    want = exact(network, call)
    plain = error(dirotq.accelerate(network, compile=False), call, want)
    before = compilations()
    assert error(dirotq.accelerate(network, compile=True), call, want) <= 2 * plain
    assert compilations() > before


def tiny(name: str) -> Any:
    changes = {"guidance_embeds": True} if name == "flux" else {}
    made = TINY[name].build(**changes)

    def linear(site: Any) -> Any:
        rank = 16 if site.kind == "block" else 0
        spec = tiny_spec(
            dim=site.in_features, rows=site.out_features, rank=rank, act_scale="rms", act_group=16,
            block=32,
        )  # fmt: skip
        module = packed(spec, bias=site.bias)
        module.wscale.mul_(0.3)
        return module

    swap_sites(made, family_of(type(made).__name__).sites(made), linear)
    return made


def called(made: Any, name: str, dtype: torch.dtype, device: str) -> Tensor:
    given = Call((), TINY[name].inputs()).map(
        lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype)
    )
    with torch.no_grad():
        result = made(**given.kwargs, return_dict=False)[0]
    result = torch.stack(list(result)) if isinstance(result, list) else result
    return result.cpu().double()


READ_BACK = {"qwen_image21": "repeat_interleave.Tensor reads values of the device back"}
"""Its forward expands image slots by a mask on the device: blocks are compiled, it has no graph."""


@pytest.mark.parametrize("name", TINY)
def test_every_family_compiled_and_recorded(name, caplog):
    """As exact as module by module, and so is a replay; the compiler has nothing to complain of."""
    plain = tiny(name)
    want = called(copy.deepcopy(plain).double(), name, torch.float64, "cpu")
    off = lambda got: float((got - want).norm() / want.norm())  # noqa: E731
    made = plain.to("cuda", torch.bfloat16)
    alone = off(called(made, name, torch.bfloat16, "cuda"))
    dirotq.accelerate(made, compile=True, graphs=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert off(called(made, name, torch.bfloat16, "cuda")) <= 2 * alone
    said = [r.getMessage() for r in caplog.records if r.name.startswith("dirotq")]
    recorded = any(graph is not None for graph in made.forward.calls.values())
    if name in READ_BACK:
        assert len(said) == 1 and READ_BACK[name] in said[0] and not recorded
    else:
        assert recorded and not said
    blocks = compiled.repeated_blocks(made)
    assert blocks and not any(block.forward.compiler.failed for block in blocks)


def test_another_resolution_and_batch(network):
    dirotq.accelerate(network, compile=True, graphs=True)
    for tokens, batch in [(64, 1), (100, 1), (64, 2), (144, 1), (64, 1), (100, 1)]:
        call = arguments(1, tokens, batch)
        want = exact(network, call)
        plain = error(dirotq.accelerate(copy.deepcopy(network), compile=False), call, want)
        for _ in range(3):
            assert error(network, call, want) <= 2 * plain


@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(kind, use_stream):
    """Weights come from host memory in time; blocks that come as a whole run compiled."""
    twin = build("cpu")
    dirotq.accelerate(twin, compile=True, graphs=True)
    twin.enable_group_offload(
        onload_device=torch.device("cuda"), offload_device=torch.device("cpu"),
        offload_type=kind, use_stream=use_stream,
        num_blocks_per_group=1 if kind == "block_level" else None,
    )  # fmt: skip
    stays = build()
    for seed in range(3):
        call = arguments(seed)
        want = exact(stays, call)
        assert error(twin, call, want) <= 2 * error(stays, call, want), seed


@pytest.mark.parametrize("scales", ["rms", "pow2"])
@pytest.mark.parametrize("kind", ["plain", "gelu", "concat"])
def test_sources_at_full_width(kind, scales):
    """FLUX's sites: rows of 3072 to 15360 channels, more rows than programs."""
    from dirotq.kernels.prologue import concat_gelu, gelu, plain
    from dirotq.kernels.transform_quantize.kernel import launch

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x = draw(2, 1153, 3072)
    prologue = {
        "plain": lambda: plain(x),
        "gelu": lambda: gelu(x),
        "concat": lambda: concat_gelu(x, draw(2, 1153, 21504)[..., 9216:]),
    }[kind]()
    spec = spec_of(scales, prologue.channels, 64)
    basis = torch.linalg.qr(torch.randn(prologue.channels, spec.rank, device="cuda")).Q.bfloat16()
    rows = prologue.value().reshape(prologue.rows, prologue.channels)
    want, want_scale, want_c = launch(rows, basis, None, spec, container=torch.float8_e4m3fn)
    got, scale, c = launch(prologue, basis, None, spec, container=torch.float8_e4m3fn)
    assert c is not None and want_c is not None
    assert (c.float() - want_c.float()).norm() < 0.01 * want_c.float().norm()
    apart = got.float() * scale - want.float() * want_scale
    # Codes on the other side of a tie are a step apart; there are few.
    assert apart.norm() < 0.06 * (want.float() * want_scale).norm()
