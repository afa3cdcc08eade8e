"""What launches pass to the compiler is what tests/kernels/test_aot.py compiles, chip by chip."""

import importlib
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from tiny_spec import FP4, tiny_spec

from dirotq.kernels import engine
from dirotq.kernels.attention import kernel as attention
from dirotq.kernels.build import CHIPS, FP8_CHIPS, Build, Config, by_launch
from dirotq.kernels.chip import chained
from dirotq.kernels.fp4_linear import kernel as fp4_linear
from dirotq.kernels.fp8_qkv import kernel as fp8_qkv
from dirotq.kernels.gptq import kernel as gptq
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.norm_rope import into_fp8
from dirotq.kernels.norm_rope import kernel as norm_rope
from dirotq.kernels.plan import candidates_for, choose
from dirotq.kernels.prologue import Prologue, concat_gelu, gelu, plain
from dirotq.kernels.second_moment import kernel as second_moment
from dirotq.kernels.transform_quantize import configs
from dirotq.kernels.transform_quantize import fp4 as rounding
from dirotq.kernels.transform_quantize import kernel as transform_quantize

OPS = sorted(
    p.parent.name for p in Path(transform_quantize.__file__).parents[1].glob("*/kernel.py")
)
LAUNCHING = (
    transform_quantize, rounding, fp4_linear, norm_rope, into_fp8, attention, fp8_qkv,
    second_moment,
)  # fmt: skip
every_chip = pytest.mark.parametrize("chip", CHIPS)
BF16 = torch.bfloat16
FLUX = {"dim": 3072, "rows": (1024,), "rank": 64, "block": 256, "act_group": 64, "weight_group": 64}
FORMATS = {
    "rms": tiny_spec(**FLUX | {"act_group": 16}, act_scale="rms"),
    "floats": tiny_spec(**FLUX, act_scale="rms", act_bits=8),
    "token": tiny_spec(**FLUX),
    "pow2": tiny_spec(**FLUX, act_scale="pow2"),
    "w4a8": tiny_spec(**FLUX, act_bits=8),
    "groups": tiny_spec(**FLUX, act_scale="group", weight_scale="group"),
    "nvfp4": tiny_spec(**FLUX | FP4["nvfp4"]),
    "mxfp4": tiny_spec(**FLUX | FP4["mxfp4"]),
}


IN_FP8 = {
    (128, 128, 1), (128, 128, 2), (128, 64, 1), (128, 64, 2), (None, 128, 1), (128, None, 1),
    (128, None, 2), (40 * 128, 64, 1),
}  # fmt: skip
"""Numbers of a weight, channels of tables and parts that families have."""


@pytest.fixture(scope="module")
def builds() -> list[Build]:
    modules = (importlib.import_module(f"builds.{op}") for op in OPS)
    return [build for module in modules for build in module.builds()]


@pytest.fixture
def launched(monkeypatch, chip) -> list[Config]:
    """Everything launched, in place of a launch on ``chip``."""
    found: list[Config] = []
    for module in LAUNCHING:
        monkeypatch.setattr(module, "capability", lambda device: chip)
    monkeypatch.setattr(Config, "launch", lambda self, grid, *arguments: found.append(self))
    monkeypatch.setattr(
        torch, "_scaled_mm", lambda a, b, *, out_dtype, **_: a.new_empty(len(a), b.shape[1])
    )
    return found


def assert_built(launched: list[Config], builds: list[Build], chip: int) -> None:
    assert launched
    for config in launched:
        known = [b.config for b in builds if b.kernel is config.kernel and chip in b.chips]
        off = [differences(config, other) for other in known]
        assert {} in off, (config.kernel, min(off, key=len, default="no build"))


def differences(a: Config, b: Config) -> dict[str, tuple]:
    left, right = ({**c.constants, **c.options} for c in (a, b))
    return {n: (left.get(n), right.get(n)) for n in {*left, *right} if left.get(n) != right.get(n)}


def prologue_of(kind: str, rows: int) -> Prologue:
    x = torch.empty(1, rows, 3072, dtype=BF16)
    if kind == "concat":
        return concat_gelu(x[..., :1024], x[..., 1024:])
    return gelu(x) if kind == "gelu" else plain(x)


@every_chip
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "plain") for name in FORMATS] + [("rms", kind) for kind in ("gelu", "concat")],
)
def test_linears(chip, name, kind, launched, builds, monkeypatch):
    spec = FORMATS[name]
    project = configs.usual(kind, chip).project
    parts = 4 if spec.activations.statistic == "rms" else 1
    rows = 64 * project.bm
    wanted = -(-parts * 64 // project.per_sm)
    monkeypatch.setattr(configs, "processors", lambda device: wanted)
    packed = QuantLinear(spec, bias=True).packed()
    plans = candidates_for(chip, rows, spec.outputs, spec, BF16)
    for plan in plans:  # all of them: tuning may choose any
        y = engine.linear(plan, prologue_of(kind, rows), packed, spec)
        assert y.shape == (rows, 1024)
    if plans:
        assert_built(launched, builds, chip)


@every_chip
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, BF16), (64, BF16), (600, BF16), (600, torch.float16)]
)
@pytest.mark.parametrize("name", FP4)
def test_fp4_weights_and_sixteen_bit_activations(chip, rows, name, dtype, launched, builds):
    weights = {"weight_scale": name, "weight_group": FP4[name]["weight_group"]}
    spec = tiny_spec(**FLUX | {"rank": 0, "block": 1} | weights, act_bits=16)
    plan = choose(chip, rows, 1024, spec, dtype)
    packed = QuantLinear(spec, bias=False).packed()
    engine.linear(plan, torch.empty(rows, 3072, dtype=dtype), packed, spec)
    assert_built(launched, builds, chip)


@every_chip
@pytest.mark.parametrize("rows", [1, 3, 8, 64, 600])
def test_linears_of_sixteen_bit_activations(chip, rows, launched, builds):
    spec = tiny_spec(**FLUX | {"rank": 0, "block": 1}, act_bits=16, weight_scale="group")
    packed = QuantLinear(spec, bias=True).packed()
    x = torch.empty(rows, 3072, dtype=BF16)
    plan = choose(chip, rows, 1024, spec, BF16)
    engine.linear(plan, x, packed, spec)
    assert_built(launched, builds, chip)


@every_chip
@pytest.mark.parametrize("weight", [None, 128, 40 * 128], ids=["plain", "head", "across"])
@pytest.mark.parametrize("table", [None, 64, 128], ids=["norm", "pairs", "channels"])
def test_norms_and_rotations(chip, weight, table, launched, builds):
    if (table, weight) in ((None, None), (64, None), (None, 5120), (128, 5120)):
        pytest.skip("no family has it")
    q = torch.empty(1, 64, 40 if weight == 40 * 128 else 24, 128, dtype=BF16)
    weights = [None if weight is None else torch.empty(weight, dtype=BF16)]
    tables = [None if table is None else torch.empty(1, 64, 1, table)]
    norm_rope.launch([q], weights, 1e-6, tables, tables, True)
    if weight is None:
        norm_rope.launch([q], weights, None, tables, tables, True)
    if weight == 128 and table is not None:
        norm_rope.launch([q], weights, 1e-6, tables, tables, False)
    assert_built(launched, builds, chip)


@pytest.mark.parametrize("chip", FP8_CHIPS)
@pytest.mark.parametrize("weight", [None, 128, 40 * 128], ids=["plain", "head", "across"])
@pytest.mark.parametrize("table", [None, 64, 128], ids=["norm", "pairs", "channels"])
@pytest.mark.parametrize("parts", [1, 2])
def test_norms_and_rotations_in_fp8(chip, weight, table, parts, launched, builds):
    if (weight, table, parts) not in IN_FP8:
        pytest.skip("no family has it")
    q = [torch.empty(1, 64, 40 if weight == 40 * 128 else 24, 128, dtype=BF16)] * parts
    weights = [None if weight is None else torch.empty(weight, dtype=BF16)] * parts
    tables = [None if table is None else torch.empty(1, 64, 1, table)] * parts
    into_fp8.launch_codes(q, weights, 1e-6, tables, tables, True)
    assert_built(launched, builds, chip)


@pytest.mark.parametrize("chip", FP8_CHIPS)
@pytest.mark.parametrize("keys", [256, 250])
def test_attention(chip, keys, launched, builds):
    q = torch.empty(1, keys, 2, 128, dtype=BF16)
    attention.launch(q, q, q, scale=0.1)
    fp8_qkv.launch(q, q, q)
    fp8_qkv.launch_values(q)
    assert_built(launched, builds, chip)


@every_chip
def test_kernels_of_the_offline_stages(chip, launched, builds):
    second_moment.launch(torch.empty(3, 256, 256), torch.empty(64, 512, dtype=BF16))
    w = torch.empty(48, 128)
    gptq.launch(w, w, w[:, :1], torch.empty(128, 128))
    assert_built(launched, builds, chip)


def test_a_constant_of_one_build_is_missed(builds):
    """The comparison above would see a single other constant."""
    config = next(b.config for b in builds if "CHAIN" in b.constants and 90 in b.chips)
    assert config.constants["CHAIN"]
    other = Config(kernel=config.kernel, constants=config.constants | {"CHAIN": False})
    with pytest.raises(AssertionError):
        assert_built([other], builds, 90)


def test_chains_are_compiled_for_chips_that_have_them(builds):
    chains = {c: {b.constants["CHAIN"] for b in builds if "CHAIN" in b.constants and c in b.chips}
              for c in CHIPS}  # fmt: skip
    # Rounding alone never chains behind library products of ``rms`` (configs.round_rows).
    assert all(chains[c] == {chained(c)} for c in CHIPS)
    assert by_launch() == [(80, 86, 89), (90, 100, 120)]
    assert by_launch((90,)) == [(90,)]
