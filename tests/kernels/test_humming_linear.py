"""Humming's layouts, the repacking kernel and what a plan makes of the package."""

import functools
import logging

import pytest
import torch
from fake_humming import FakeHumming, codes_of, in_order
from formats import DEVICE, inputs, random_linear
from tiny_spec import tiny_spec

pytest.importorskip("triton")

from dirotq.kernels import engine, measured
from dirotq.kernels import plan as plans
from dirotq.kernels.buffers import Codes, Packed
from dirotq.kernels.formats.pack_int4 import pack_int4, unpack_int4
from dirotq.kernels.humming_linear import library, repack
from dirotq.kernels.humming_linear.kernel import allocate, builds, launch
from dirotq.kernels.humming_linear.reference import permuted_outputs
from dirotq.kernels.permuted import to_permuted
from dirotq.kernels.plan import Plan, candidates_for, choose
from dirotq.kernels.recorder import Recorder
from dirotq.kernels.w4a4_linear import w4a4_linear

BF16 = torch.bfloat16
PLAN = Plan(engine="humming", container="int8")
SHAPE = {"dim": 192, "rows": (64,), "block": 64, "act_group": 64, "weight_group": 64}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Humming as if installed, whether it is or not."""
    forget()
    monkeypatch.setenv("HUMMING_CACHE_DIR", str(tmp_path))
    found = FakeHumming()
    found.install(monkeypatch, library)
    yield found
    monkeypatch.undo()
    forget()


@pytest.fixture
def absent(monkeypatch):
    forget()
    monkeypatch.setattr(library, "PACKAGE", "no-such-package")
    yield
    monkeypatch.undo()
    forget()


def forget() -> None:
    for known in (library.missing, library.compiled, library._module, plans._refused):
        known.cache_clear()
    plans.renew()


def packed(n: int, k: int, *, rank: int = 0, bias: bool = True) -> Packed:
    torch.manual_seed(n + k)
    q = pack_int4(torch.randint(-8, 8, (n, k), dtype=torch.int8))
    wp = torch.randn(n, rank).to(BF16) if rank else None
    made = Packed(
        q, (torch.rand(n, 1) + 0.01).to(BF16), wp=wp, bias=torch.randn(n).to(BF16) if bias else None
    )
    return Packed(*(None if t is None else t.to(DEVICE) for t in made))


def test_the_layout_holds_the_codes_in_the_order_of_the_activations():
    q = packed(128, 192).qweight.cpu()
    assert torch.equal(codes_of(repack(q)), to_permuted(unpack_int4(q)).long())


def test_the_layout_is_what_humming_makes_of_packed_rows():
    """``transform_humming_weight`` of flat weights: tiles of 64 outputs, chunks of four words."""
    q = packed(128, 192).qweight.cpu()
    nibbles = to_permuted(unpack_int4(q)).long().view(128, 24, 8) & 0xF
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1).to(torch.int32)
    tiles = words.reshape(-1, 2, 64, 6, 4).permute(0, 3, 1, 2, 4).reshape(128, 24)
    assert torch.equal(repack(q), tiles)


def test_scales_lie_as_a_thread_has_them():
    values = torch.randn(96)
    assert torch.equal(in_order(permuted_outputs(values)), values)
    assert permuted_outputs(torch.arange(64))[32:44].tolist() == [
        32, 33, 40, 41, 48, 49, 56, 57, 34, 35, 42, 43,
    ]  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), [(64, 64), (128, 128), (192, 256), (64, 320), (1088, 192)])
def test_repacking_is_exact(n, k, bias, empty_is):
    made = packed(n, k, bias=bias)
    for byte in (255, 0):
        with empty_is(byte):
            got = launch(made)
        assert torch.equal(got.weights, repack(made.qweight))
        assert torch.equal(got.scale[0], permuted_outputs(made.wscale[:, 0]))
        assert (got.bias is None) == (not bias)
        if got.bias is not None:
            assert torch.equal(got.bias, permuted_outputs(made.bias))
        assert not got.locks.any()


def test_rows_of_a_shared_site_in_given_memory():
    made = packed(192, 128)
    part = made.rows(slice(64, 128))
    given = allocate(part)
    assert launch(part, given) is given
    assert torch.equal(given.weights, repack(part.qweight))


def test_builds_name_every_argument():
    for build in builds():
        assert set(build.signature) | set(build.constants) == set(build.kernel.arg_names)
        assert set(build.aligned) <= set(build.signature), build.name
    assert len({b.name for b in builds()}) == len(builds())


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/gpu runs the package itself there")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [0, 24])
def test_the_product(rank, bias, fake):
    made = packed(128, 192, rank=rank, bias=bias)
    q = torch.randint(-127, 128, (5, 192), dtype=torch.int8)
    scale, c = torch.rand(5, 1) + 0.1, torch.randn(5, 32).to(BF16)[:, :rank] if rank else None
    codes = Codes(to_permuted(q), scale, c)
    want = w4a4_linear(
        q, scale.double(), None if c is None else c.double(), made.qweight, made.wscale, made.wp,
        made.bias,
    ).double()  # fmt: skip
    got = library.multiply(codes, launch(made), made.wp)
    assert got.dtype == BF16
    assert (got.double() - want).norm() < 2.0**-8 * want.norm()
    ((layer, rows),) = fake.asked
    assert rows == 5
    assert layer == {
        "shape_n": 128, "shape_k": 192, "a_dtype": "int8", "b_dtype": "uint4",
        "c_dtype": "bfloat16", "has_bias": bias,
    }  # fmt: skip
    library.multiply(codes, launch(made), made.wp)
    assert len(fake.asked) == 1


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/gpu runs the package itself there")
@pytest.mark.parametrize("act", [{"act_scale": "pow2"}, {}, {"act_bits": 8}])
def test_a_whole_linear(act, fake):
    spec = tiny_spec(**SHAPE, **act)
    module, x = random_linear(spec), inputs(40, 192, torch.float16)  # interpreted: no bf16
    want = engine.reference(x.double(), module.packed(), spec)
    plain = engine.reference(x, module.packed(), spec).double() - want
    got = engine.linear(PLAN, x, module.packed(), spec).double() - want
    assert got.norm() < 2 * plain.norm() + 2.0**-8 * want.norm()


@pytest.mark.parametrize(
    ("chip", "dtype", "change", "why"),
    [
        (90, BF16, {}, None),
        (80, BF16, {"act_bits": 8}, None),
        (89, BF16, {"act_scale": "pow2"}, None),
        (86, BF16, {"act_scale": "rms"}, None),
        (100, BF16, {}, "not used on sm_100"),
        (90, torch.float16, {}, "in bfloat16, not float16"),
        (90, BF16, {"act_scale": "rms", "act_bits": 8}, "integers"),
        (90, BF16, {"weight_scale": "group"}, "one weight scale per output"),
        (90, BF16, {"act_scale": "group"}, "one activation scale per row"),
        (90, BF16, {"rows": (48,)}, "not 192 -> 48"),
        (90, BF16, {"dim": 224, "block": 32, "act_group": 32, "weight_group": 32}, "not 224 -> 64"),
    ],
)
def test_what_it_is_used_for(chip, dtype, change, why, fake):
    spec = tiny_spec(**SHAPE | change)
    said = library.why_not(chip, 4608, spec.outputs, spec, dtype)
    assert said is None if why is None else why in said
    found = [p.engine for p in candidates_for(chip, 4608, spec.outputs, spec, dtype)]
    assert ("humming" in found) == (why is None)
    assert found[0] != "humming"


def test_few_rows_are_left_to_others(fake):
    for rows, used in ((255, False), (256, True)):
        found = [p.engine for p in candidates_for(90, rows, 64, tiny_spec(**SHAPE), BF16)]
        assert ("humming" in found) == used


def test_without_the_package(absent):
    spec = tiny_spec(**SHAPE)
    assert "pip install 'dirotq[humming]'" in library.why_not(90, 4608, 64, spec, BF16)
    assert "humming" not in [p.engine for p in candidates_for(90, 4608, 64, spec, BF16)]


def test_another_version_of_the_package(monkeypatch, fake):
    monkeypatch.setattr(library.metadata, "version", lambda name: "0.2.0")
    assert "humming-kernels 0.2.0 is installed; 0.1.20 is known" in library.missing()


@pytest.fixture
def measured_rows(monkeypatch):
    """Humming was the fastest at one shape, the library's product there without it."""
    row = measured.Row(4608, 64, 192, "humming", "on sm_90")
    found = (row, row._replace(plan="scaled_mm"))
    monkeypatch.setattr(plans.measured, "rows", functools.cache(lambda chip, kind: found))
    plans.renew()
    yield
    monkeypatch.undo()
    plans.renew()


def test_measurement_chooses_it(fake, measured_rows):
    chosen = choose(90, 4608, 64, tiny_spec(**SHAPE), BF16)
    assert (chosen.engine, chosen.container, chosen.tile) == ("humming", "int8", None)
    assert plans.name_of(chosen) == "humming"
    # Nothing to install helps what Humming is not used for.
    half = choose(90, 4608, 64, tiny_spec(**SHAPE), torch.float16)
    floats = choose(90, 4608, 64, tiny_spec(**SHAPE, act_scale="rms", act_bits=8), BF16)
    assert floats.engine == "scaled_mm"
    assert "humming" not in half.why + floats.why


def test_levels_are_left_to_others_and_it_is_said(fake, measured_rows, caplog):
    levels = tiny_spec(**SHAPE | {"weight_scale": "lm4_channel"})
    plans.say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        chosen = choose(90, 4608, 64, levels, BF16)
        choose(90, 4607, 64, levels, BF16)
    assert chosen.engine == "scaled_mm"
    assert "humming was faster there: it reads integers itself" in chosen.why
    assert [r.getMessage() for r in caplog.records] == [
        "Humming is left out: it reads integers itself, and these weights are levels (lm4)"
    ]
    few = choose(90, 16, 64, levels, BF16)  # of which integers would not have it either
    assert "humming" not in few.why


def test_a_plan_says_what_to_install(absent, measured_rows):
    chosen = choose(90, 4608, 64, tiny_spec(**SHAPE), BF16)
    assert chosen.engine == "scaled_mm"
    assert "humming was faster there: Humming is not installed (pip install" in chosen.why
    assert "humming" not in choose(90, 4608, 48, tiny_spec(**SHAPE | {"rows": (48,)}), BF16).why


def test_rules_without_measurement_never_choose_it(fake, monkeypatch):
    monkeypatch.setattr(plans.measured, "rows", functools.cache(lambda chip, kind: ()))
    plans.renew()
    for chip in library.CHIPS:
        for rows in (1, 64, 4608):
            assert choose(chip, rows, 64, tiny_spec(**SHAPE), BF16).engine != "humming"


@pytest.mark.parametrize("error", [RuntimeError("no nvcc"), AssertionError(), KeyError("nvcc")])
def test_a_kernel_that_does_not_compile_gives_way(error, fake, measured_rows, caplog):
    fake.failing = error
    spec, device = tiny_spec(**SHAPE), torch.device("cpu")
    chosen = choose(90, 4608, 64, spec, BF16)
    with pytest.raises(library.NotCompiledError, match=type(error).__name__) as raised:
        library.compiled(4608, 64, 192, True, device)
    with caplog.at_level(logging.WARNING):
        assert plans.refuse(90, spec, chosen, raised.value)
    then = choose(90, 4608, 64, spec, BF16)
    assert then.engine == "scaled_mm"
    assert "humming did not compile here" in then.why


def test_compiling_leaves_a_recording_alone(fake):
    with Recorder((torch.zeros(1),), torch.device("cpu")) as recorder:
        library.compiled(4608, 64, 192, True, torch.device("cpu"))
    assert fake.asked and recorder.why is None


def test_other_faults_are_not_taken_for_the_compilers(fake):
    fake.failing = torch.OutOfMemoryError("full")
    with pytest.raises(torch.OutOfMemoryError):
        library.compiled(4608, 64, 192, True, torch.device("cpu"))


def test_another_layout_is_refused(fake, monkeypatch):
    FakeHumming(flat=False).install(monkeypatch, library)
    with pytest.raises(library.NotCompiledError, match="HUMMING_DISABLE_PATCH_CUBIN"):
        library.compiled(4608, 64, 192, True, torch.device("cpu"))
