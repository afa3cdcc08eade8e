"""Which engine an attention takes, chip by chip, and how FlashAttention-3 is found and called."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from attending import attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("triton")

from dirotq.kernels.attention import engines, flash3
from dirotq.kernels.attention.engines import LONG, LONG_INT8, choose
from dirotq.kernels.chip import say_once
from dirotq.kernels.fp8_qkv import Codes, attend, quantize
from dirotq.kernels.fp8_qkv import attention as fp8_attention

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class OnGpu(torch.Tensor):
    device = torch.device("cuda")


def rows(tokens: int, d: int = 128, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(1, tokens, 1, d, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def on(monkeypatch):
    """``on(chip, installed=True)``: tensors of ``rows`` lie on such a GPU."""

    def put(chip: int | None, *, installed: bool = True) -> None:
        monkeypatch.setattr(engines, "capability", lambda device: chip)
        monkeypatch.setattr(flash3, "installed", lambda: print if installed else None)

    say_once.cache_clear()
    return put


@pytest.mark.parametrize(
    ("chip", "installed", "tokens", "d", "dtype", "mode", "engine"),
    [
        # Hopper, exact
        (90, True, LONG, 128, BF16, "exact", "flash3"),
        (90, True, LONG - 1, 128, BF16, "exact", "torch"),
        (90, False, LONG, 128, BF16, "exact", "torch"),
        (90, True, LONG, 128, FP16, "exact", "torch"),
        (90, True, LONG, 128, FP32, "exact", "torch"),
        (90, True, LONG, 72, BF16, "exact", "flash3"),
        (90, True, LONG, 100, BF16, "exact", "torch"),
        (90, True, LONG, 256, BF16, "exact", "flash3"),
        (90, True, LONG, 264, BF16, "exact", "torch"),
        # Hopper, 8 bits
        (90, True, LONG, 128, BF16, "fp8", "flash3 fp8"),
        (90, True, LONG - 1, 128, BF16, "fp8", "torch"),
        (90, True, LONG, 96, BF16, "fp8", "flash3 fp8"),
        (90, True, LONG, 72, BF16, "fp8", "flash3"),
        (90, True, LONG_INT8, 72, BF16, "fp8", "int8"),
        (90, True, LONG_INT8, 128, FP16, "fp8", "int8"),
        (90, True, LONG_INT8, 128, FP32, "fp8", "torch"),
        (90, True, LONG_INT8, 192, BF16, "fp8", "flash3"),
        (90, False, LONG_INT8, 128, BF16, "fp8", "int8"),
        (90, False, LONG_INT8 - 1, 128, BF16, "fp8", "torch"),
        # others
        (89, True, LONG_INT8, 128, BF16, "exact", "torch"),
        (89, True, LONG_INT8, 128, BF16, "fp8", "int8"),
        (120, True, LONG_INT8 - 1, 128, BF16, "fp8", "torch"),
        (86, True, LONG_INT8, 128, BF16, "fp8", "torch"),
        (None, True, LONG_INT8, 128, BF16, "fp8", "torch"),
    ],
)
def test_engines(chip, installed, tokens, d, dtype, mode, engine, on):
    on(chip, installed=installed)
    x = rows(tokens, d, dtype)
    assert choose(x, x, None, None, mode) == engine


@pytest.mark.parametrize("mode", ["exact", "fp8"])
def test_few_queries_or_keys_are_torchs(mode, on):
    on(90)
    long, short = rows(LONG), rows(300)
    assert choose(long, short, None, None, mode) == "torch"
    assert choose(short, long, None, None, mode) == "torch"
    assert choose(rows(0), long, None, None, mode) == "torch"


@pytest.mark.parametrize("mode", ["exact", "fp8"])
def test_masks_and_scales_that_are_not_positive_are_torchs(mode, on):
    on(90)
    x = rows(LONG)
    assert choose(x, x, torch.ones(1, 1, dtype=torch.bool), None, mode) == "torch"
    assert choose(x, x, None, 0.0, mode) == choose(x, x, None, -1.0, mode) == "torch"
    assert choose(x, x, None, 0.1, mode) != "torch"


@pytest.mark.parametrize("mode", ["exact", "fp8"])
def test_a_chosen_backend_of_torch_is_obeyed(mode, on):
    on(90)
    x = rows(LONG)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert choose(x, x, None, None, mode) == "torch"
    assert choose(x, x, None, None, mode) != "torch"


def test_cpus_compute_the_specification_of_fp8():
    x = torch.randn(1, 5, 1, 32)
    assert choose(x, x, None, None, "fp8") == "fp8 reference"
    assert choose(x, x, None, None, "exact") == "torch"
    assert not torch.equal(attention(x, x, x, mode="fp8"), attention(x, x, x))


@pytest.mark.parametrize(
    ("chip", "installed", "d", "dtype", "said"),
    [
        (90, False, 128, BF16, [f"not installed ({flash3.INSTALL})", f"{LONG_INT8} tokens"]),
        (90, True, 72, BF16, ["72 channels", "multiples of 16"]),
        (90, False, 200, BF16, ["computes exactly", "200 channels", "takes 1 to 128"]),
        (86, False, 128, BF16, ["computes exactly", "compute capability 8.6", "8.9"]),
        (90, True, 128, FP32, ["computes exactly", "float32"]),
        (90, True, 128, BF16, []),
        (89, False, 128, BF16, []),
    ],
)
def test_what_is_missing_is_said_once(chip, installed, d, dtype, said, on, caplog):
    on(chip, installed=installed)
    x = rows(LONG, d, dtype)
    with caplog.at_level(logging.WARNING):
        choose(x[:, :300], x[:, :300], None, None, "fp8")
        assert not caplog.records  # exact is faster there, whatever is installed
        for _ in range(3):
            choose(x, x, None, None, "fp8")
            choose(x, x, None, None, "exact")
    assert len(caplog.records) == bool(said)
    assert all(part in caplog.text for part in said)


@pytest.fixture
def package(monkeypatch):
    """``package(name, schema)``: a package whose operator has such a schema; calls it notes."""
    calls: list[dict] = []
    names = set()

    def install(name: str, *arguments: str) -> list[dict]:
        names.add(name)

        def forward(q, k, v, **more):
            calls.append({"package": name, "q": q, "k": k, "v": v, **more})
            return torch.zeros_like(q, dtype=BF16), None

        schema = SimpleNamespace(arguments=[SimpleNamespace(name=n) for n in arguments])
        forward._schema = schema
        space = SimpleNamespace(fwd=SimpleNamespace(default=forward))
        monkeypatch.setitem(sys.modules, f"{name}._C", SimpleNamespace())
        monkeypatch.setattr(torch.ops, name, space, raising=False)
        return calls

    monkeypatch.setattr(flash3, "find_spec", lambda name: name in names or None)
    monkeypatch.setattr(
        flash3.importlib, "import_module", lambda name: sys.modules.get(name) or _absent(name)
    )
    flash3.installed.cache_clear()
    say_once.cache_clear()
    yield install
    flash3.installed.cache_clear()


def _absent(name: str):
    raise ImportError(f"no {name}")


def test_nothing_is_installed(package):
    assert flash3.installed() is None
    assert flash3.INSTALL in flash3.why_not(90, 128, BF16, fp8=False)
    with pytest.raises(ImportError, match="attention"):
        flash3.exact(rows(2), rows(2), rows(2), scale=1.0)


def test_the_official_build_comes_first(package):
    calls = package("fa3_fwd", *flash3.NEEDED)
    package("flash_attn_3", *flash3.NEEDED)
    q = torch.zeros(1, 2, 1, 8, dtype=BF16)
    flash3.exact(q, q, q, scale=0.5)
    assert calls[0]["package"] == "flash_attn_3"
    assert {"softmax_scale": 0.5, "num_splits": 1}.items() <= calls[0].items()


def test_codes_go_with_their_scales(package):
    calls = package("fa3_fwd", *flash3.NEEDED)
    codes = quantize(*(torch.randn(1, 4, 2, 16) for _ in range(3)))
    assert flash3.fp8(codes, scale=0.3).dtype == BF16
    (call,) = calls
    assert call["q"].dtype == torch.float8_e4m3fn
    for name in "qkv":
        assert call[f"{name}_descale"].shape == (1, 2)
    assert torch.equal(call["k_descale"], codes.k_scale_BH)


def test_codes_scales_and_product_fit_together(monkeypatch):
    """The kernels' codes in a product that does what FlashAttention-3 does."""

    def product(q, k, v, *, softmax_scale, q_descale, k_descale, v_descale):
        return attend(Codes(q, k, v, q_descale, k_descale, v_descale), scale=softmax_scale)

    monkeypatch.setattr(flash3, "installed", lambda: product)
    monkeypatch.setattr(engines, "choose", lambda *_: "flash3 fp8")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, n, 2, 32) for n in (20, 70, 70)]
    q, k, v = (torch.randn(shape, generator=draw).half().to(device) for shape in shapes)
    for scale in (None, 0.3):
        got = attention(q, k, v, mode="fp8", scale=scale)
        want = fp8_attention(q, k, v, scale=scale or 32**-0.5)
        assert (got.float() - want.float()).norm() < 0.01 * want.float().norm()


@pytest.mark.parametrize("fault", ["import", "schema"])
def test_a_package_that_does_not_load_is_told(package, fault, monkeypatch, caplog):
    package("fa3_fwd", *(flash3.NEEDED if fault == "import" else flash3.NEEDED[1:]))
    if fault == "import":
        monkeypatch.setitem(sys.modules, "fa3_fwd._C", None)
    with caplog.at_level(logging.WARNING):
        assert flash3.installed() is None
        flash3.installed.cache_clear()
        assert flash3.installed() is None
    assert len(caplog.records) == 1
    assert "fa3_fwd" in caplog.text


def test_the_hubs_kernel_is_taken_if_it_is_loaded(package, monkeypatch):
    module = SimpleNamespace(flash_attn_func=lambda q, k, v, **scales: (q + 1, scales))
    ours = SimpleNamespace(module=module, repo_info=SimpleNamespace(repo_id=flash3.HUB))
    others = None, SimpleNamespace(repo_id="a/b")
    loaded = [SimpleNamespace(module=None, repo_info=info) for info in others]
    library = SimpleNamespace(get_loaded_kernels=lambda: loaded)
    monkeypatch.setitem(sys.modules, "kernels", library)
    assert flash3.installed() is None
    flash3.installed.cache_clear()
    loaded.append(ours)
    q = torch.zeros(1, 2, 1, 8, dtype=BF16)
    assert (flash3.exact(q, q, q, scale=0.5) == 1).all()
    flash3.installed.cache_clear()
    del library.get_loaded_kernels  # of an old version
    assert flash3.installed() is None


def test_rows_stay_where_they_are_if_they_can(package):
    calls = package("fa3_fwd", *flash3.NEEDED)
    wide = torch.zeros(1, 6, 3, 2, 16, dtype=BF16)
    q, k, v = wide.unbind(2)
    flash3.exact(q, k, v, scale=1.0)
    assert calls[-1]["k"].data_ptr() == k.data_ptr()
    odd = torch.zeros(1, 6, 2, 17, dtype=BF16)[..., 1:]  # rows at odd multiples of two bytes
    across = torch.zeros(1, 6, 16, 2, dtype=BF16).mT
    flash3.exact(odd, across, v, scale=1.0)
    assert calls[-1]["q"].is_contiguous()
    assert calls[-1]["k"].is_contiguous()
