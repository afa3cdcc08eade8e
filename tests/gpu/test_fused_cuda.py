"""Fused FLUX blocks on a real GPU against the same packed network module by module."""

import copy
from typing import Any

import pytest
import torch
from formats import spec_of
from packed_flux import arguments, build, run
from torch import Tensor

import dirotq

pytest.importorskip("triton")

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def network():
    return build()


def exact(network: Any, call: dict[str, Any]) -> Tensor:
    """In float64, which computes the specification."""
    double = dirotq.accelerate(copy.deepcopy(network).cpu().double(), fused=False)
    inputs = {k: v.cpu().double() if torch.is_tensor(v) else v for k, v in call.items()}
    return run(double, **inputs)


def error(network: Any, call: dict[str, Any], want: Tensor) -> float:
    return float((run(network, **call).cpu().double() - want).norm() / want.norm())


@pytest.mark.parametrize(("tokens", "batch"), [(64, 1), (101, 3), (1000, 2)])
def test_as_exact_as_module_by_module(network, tokens, batch):
    call = arguments(1, tokens, batch)
    want = exact(network, call)
    unfused = error(dirotq.accelerate(network, fused=False), call, want)
    assert error(dirotq.accelerate(network, fused=True), call, want) <= 2 * unfused


@pytest.mark.parametrize("use_stream", [False, True])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(kind, use_stream):
    """Weights come from host memory in time; blocks that come as a whole run fused."""
    twin = build("cpu")
    dirotq.accelerate(twin)
    twin.enable_group_offload(
        onload_device=torch.device("cuda"), offload_device=torch.device("cpu"),
        offload_type=kind, use_stream=use_stream,
        num_blocks_per_group=1 if kind == "block_level" else None,
    )  # fmt: skip
    stays = dirotq.accelerate(build(), fused=False, graphs=False)
    for seed in range(3):
        call = arguments(seed)
        want = exact(stays, call)
        assert error(twin, call, want) <= 2 * error(stays, call, want), seed


@pytest.mark.parametrize("scales", ["rms", "pow2"])
@pytest.mark.parametrize("kind", ["plain", "norm", "gelu", "concat"])
def test_sources_at_full_width(kind, scales):
    """FLUX's sites: rows of 3072 to 15360 channels, more rows than programs."""
    from dirotq.kernels.prologue import concat_gelu, gelu, modulated_norm, plain
    from dirotq.kernels.transform_quantize.kernel import launch

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x = draw(2, 1153, 3072)
    prologue = {
        "plain": lambda: plain(x),
        "norm": lambda: modulated_norm(x + 3, draw(2, 3072) / 2, draw(2, 3072)),
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
