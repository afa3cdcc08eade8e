"""`make bench-kernels`: no figure on red, rows to CSV and back, tables, and what it measures."""

import functools

import pytest
import torch

from dirotq.benchmarks import rivals, speed
from dirotq.benchmarks.linear_cases import LINEARS
from dirotq.benchmarks.published import append, read
from dirotq.benchmarks.speed_table import LESS_IS_BETTER, TITLES, Row, tables
from dirotq.kernels import transform_quantize, unpack_w4, w4a4_linear, w4a16_linear
from dirotq.kernels.case import Case
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.plan import candidates_for
from dirotq.tuning.random_linear import Checker, random_linear, random_rows, spec_for
from dirotq.tuning.timing import Timing

BEGIN, END = "<!-- begin: make bench-kernels -->", "<!-- end: make bench-kernels -->"
CASES = {
    "linear": LINEARS,
    "transform_quantize": transform_quantize.CASES,
    "unpack_w4": unpack_w4.CASES,
    "w4a4_linear": w4a4_linear.CASES,
    "w4a16_linear": w4a16_linear.CASES,
}


def row(**changes):
    fields = {"op": "linear", "case": "A", "contestant": "ours", "us_p50": 100.0, "ratio": 1.5}
    return Row(**fields | {"gpu": "H", "torch": "2", "triton": "3", "git": "abc", **changes})


@pytest.fixture
def tests_in(tmp_path, monkeypatch):
    """A file of tests with this body, run by so many processes of pytest-xdist (0: by none)."""

    def write(body, workers=0):
        monkeypatch.setattr(speed, "WORKERS", workers)  # each takes seconds to start
        path = tmp_path / "test_it.py"
        path.write_text(f"def test_kernel():\n    {body}\n")
        return str(path)

    return write


def test_red_tests_are_shown(tests_in):
    said = speed.red(tests_in("assert 1 + 1 == 3, 'wrong codes'"))
    assert "wrong codes" in said
    assert "must pass before anything is timed" in said


def test_green_tests_let_timings_through(tests_in):
    assert speed.red(tests_in("assert True", workers=1)) is None


def test_tests_that_were_not_found_are_red(tests_in):
    assert "must pass" in speed.red(tests_in("assert True"), select="another")


def test_nothing_is_timed_on_red(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(speed, "why_not", lambda select: "1 failed: wrong codes")
    monkeypatch.setattr(speed, "measured", lambda ops: pytest.fail("timed in spite of it"))
    assert speed.main(["--csv", str(tmp_path / "rows.csv"), "--write"]) == 1
    out = capsys.readouterr()
    assert out.out == ""
    assert "wrong codes" in out.err
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert speed.main([]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_unknown_ops_are_named(capsys):
    with pytest.raises(SystemExit):
        speed.main(["gem"])
    assert "unknown: gem; there are linear, gemm" in capsys.readouterr().err


def test_a_line_per_case_and_a_column_per_contestant():
    rows = [
        row(contestant="bf16", us_p50=300.0, ratio=None),
        row(us_p20=199.0, us_p50=200.0, us_p80=201.0, reach=1.4, stretch=1.6, plan="scaled_mm"),
        row(contestant="FP8", us_p50=150.0, ratio=2.0),
        row(case="B", us_p50=10.0, ratio=0.5, reach=1.0, plan="packed"),
    ]
    text = tables(rows).splitlines()
    assert text[0] == f"### {TITLES['linear']}"
    assert text[2] == "| case | ours, us | ours | reach / stretch |  | bf16 | FP8 | plan |"
    assert text[4] == (
        "| A | 200.0 [199.0, 201.0] | 1.50x | 1.4 / 1.6 | reached | 300.0 us | 2.00x | scaled_mm |"
    )
    assert text[5] == "| B | 10.0 | 0.50x | 1 | **missed** |  |  | packed |"
    assert text[-2].startswith("H; torch 2, triton 3; abc, ")


@pytest.mark.parametrize(
    ("op", "ratio", "verdict"),
    [
        ("linear", 1.39, "**missed**"),
        ("linear", 1.4, "reached"),
        ("linear", 1.6, "stretch"),
        ("linear", None, ""),
        ("transform_quantize", 1.6, "reached"),
        ("transform_quantize", 1.4, "stretch"),
        ("transform_quantize", 1.61, "**missed**"),
    ],
)
def test_verdicts(op, ratio, verdict):
    wanted = {"reach": 1.4, "stretch": 1.6} if op == "linear" else {"reach": 1.6, "stretch": 1.4}
    assert row(op=op, ratio=ratio, **wanted).verdict() == verdict


def test_rows_of_an_earlier_run_are_published(monkeypatch, capsys, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "kernels.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    append(tmp_path / "rows.csv", [row(), row(op="gemm")])
    monkeypatch.setattr(speed, "ROOT", tmp_path)
    assert speed.main(["linear", "--from", str(tmp_path / "rows.csv"), "--write"]) == 0
    text = (docs / "kernels.md").read_text()
    assert text.startswith(f"before\n{BEGIN}\n### {TITLES['linear']}")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert read(docs / "kernels.csv", Row) == [row()]


@pytest.mark.parametrize("op", CASES)
def test_cases_are_shapes_that_a_plan_takes(op):
    cases = CASES[op]
    assert len({str(case) for case in cases}) == len(cases)
    for case in cases:
        kind = "w4a16" if op == "w4a16_linear" else "w4a4"
        spec = spec_for(kind, case.k, case.n, case.rank)
        assert candidates_for(90, case.m, case.n, spec, torch.bfloat16)
        assert spec.rank == case.rank
        if case.stretch is not None:
            assert (case.stretch < case.reach) == (op in LESS_IS_BETTER), str(case)


def test_every_figure_that_was_asked_for_has_a_case():
    asked = {(c.m, c.k, c.n): (c.reach, c.stretch) for c in LINEARS}
    assert asked[4608, 3072, 9216] == (1.4, 1.6)
    assert asked[18432, 12288, 3072] == (1.35, None)
    assert asked[1024, 2240, 11200] == (1.0, 1.2)
    assert len(asked) == 20


def test_the_fp8_rival_quantizes_by_row():
    x = torch.randn(4, 64) * torch.tensor([[1e-6], [1.0], [1e4], [0.0]])
    codes, scale = rivals.fp8_rows(x)
    assert codes.dtype == torch.float8_e4m3fn
    assert (codes.float().abs().amax(1)[:3] == 448).all()
    error = (codes.float() * scale - x).abs()
    assert (error <= x.abs() / 16 + scale * 2**-10).all()


def test_the_fp8_rival_is_a_linear(monkeypatch):
    monkeypatch.setattr(rivals, "_compiled", lambda: rivals.fp8_rows)
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    x, weight, bias = (torch.randn(*s).bfloat16() for s in ((16, 128), (64, 128), (64,)))
    want = rivals.bf16(weight, bias)(x).float()
    got = rivals.fp8_per_row(weight, bias)(x).float()
    assert (got - want).norm() < 0.06 * want.norm()


@pytest.mark.parametrize("engine", ["packed", "unpacked", "scaled_mm"])
def test_the_parts_of_a_linear_make_up_the_whole(engine):
    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs the engines themselves there")
    from dirotq.benchmarks import speed_rows

    torch.manual_seed(0)  # few rows: a code at a tie that flips would count
    linear = random_linear(spec_for("w4a4", 128, 32, rank=16), device="cpu")
    x = random_rows(33, 128, device="cpu").half()  # the interpreter knows no bf16
    plans = candidates_for(90, 33, 32, linear.spec, torch.bfloat16)
    plan = next(p for p in plans if p.engine == engine)
    checker = Checker(linear, x)
    for make in (speed_rows.product, speed_rows.product_alone, speed_rows.on_unpacked):
        assert checker.problem(functools.partial(make, plan)(linear, x)()) is None


@pytest.fixture
def small_cpu(monkeypatch):
    """speed_rows on the CPU: a tiny case, the interpreter for the parts, a clock that stands."""
    if torch.cuda.is_available():
        pytest.skip("`make bench-kernels` itself runs there")
    from dirotq.benchmarks import norm_rope_rows, speed_rows

    case = Case(name="tiny", m=5, k=128, n=48, rank=16, reach=1.5)
    for op in (transform_quantize, unpack_w4, w4a4_linear, w4a16_linear):
        monkeypatch.setattr(op, "CASES", (case,))
    monkeypatch.setattr(speed_rows, "LINEARS", (case,))

    def plan(self, rows):
        kinds = candidates_for(90, rows, self.spec.outputs, self.spec, torch.float16)
        return kinds[0]  # packed, or w4a16

    def weights(case):
        return torch.randn(case.n, case.k).half(), torch.randn(case.n).half()

    def time_calls(calls):
        assert len(calls) == 3
        results = [call() for call in calls]
        assert all(result is not None for result in results)
        return Timing(9.0, 10.0, 11.0)

    on_cpu = {"device": "cpu"}
    monkeypatch.setattr(QuantLinear, "plan", plan)
    monkeypatch.setattr(speed_rows, "random_linear", functools.partial(random_linear, **on_cpu))
    monkeypatch.setattr(
        speed_rows, "random_rows", lambda m, k: random_rows(m, k, device="cpu").half()
    )
    monkeypatch.setattr(speed_rows, "_weights", weights)
    monkeypatch.setattr(speed_rows, "_fp8", lambda case: ("FP8", "", time_calls([int] * 3)))
    monkeypatch.setattr(speed_rows, "bandwidth", lambda: 1e9)
    for module in (speed_rows, norm_rope_rows):
        monkeypatch.setattr(module, "copies", lambda size: 3)
        monkeypatch.setattr(module, "time_calls", time_calls)
    queries = norm_rope_rows.Queries(
        name="tiny", tokens=(5,), heads=2, dim=8, columns=64, kind="real"
    )
    monkeypatch.setattr(norm_rope_rows, "CASES", (queries,))
    monkeypatch.setattr(
        norm_rope_rows, "inputs", functools.partial(norm_rope_rows.inputs, **on_cpu)
    )
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    return speed_rows.MEASURES


@pytest.mark.parametrize("op", TITLES)
def test_every_op_gives_rows_of_its_own(small_cpu, op):
    rows = list(small_cpu[op]())
    assert {r.op for r in rows} == {op}
    ours = [r for r in rows if r.contestant == "ours"]
    assert ours
    assert all(r.ratio is not None for r in ours)
    assert len(tables(rows).splitlines()) > 4
    if op in ("linear", "gemm", "w4a16"):
        assert ours[0].ratio == 1
        assert ours[0].reach == 1.5
        assert {r.reach for r in rows if r.contestant != "ours"} == {None}
    if op == "transform_quantize":  # 10 us against 3 * 5 * 128 bytes at 1 GB/s
        assert ours[0].ratio == pytest.approx(10 / 1.92)
    if op == "norm_rope":  # 10 us against queries twice, and tables
        assert ours[0].ratio == pytest.approx(10 / (0.32 + 0.32))
    if op == "memory":  # codes 1/4, scales, basis, V
        assert ours[0].ratio == pytest.approx(0.25 + 64 / 128 + 64 / 48, rel=0.02)
    if op == "parts":
        assert len(rows) == 7
