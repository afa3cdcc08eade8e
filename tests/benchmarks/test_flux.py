"""`make bench-flux`: rows that survive, tables, verdicts, and its contestants on the CPU."""

import dataclasses
import types

import pytest
import torch
from narrow_models import SIZES, narrowed

import dirotq
from dirotq.benchmarks import (
    contestants,
    flux,
    flux_floor,
    flux_quality,
)
from dirotq.benchmarks import session as sessions
from dirotq.benchmarks.flux_jobs import JOBS
from dirotq.benchmarks.flux_table import tables
from dirotq.benchmarks.flux_verdicts import ASKED
from dirotq.benchmarks.forward_rows import (
    COMPILED,
    EAGER,
    FLOOR,
    FOLDER,
    FP8,
    FUSED,
    SYNTHETIC,
    UNFUSED,
    W4A8,
    Row,
    latest,
    ratio,
)
from dirotq.benchmarks.forward_timing import Forward
from dirotq.benchmarks.model_inputs import Case, inputs
from dirotq.benchmarks.published import append, read
from dirotq.benchmarks.session import MAIN, Places, Session
from dirotq.benchmarks.ways import COMPILE
from dirotq.kernels.linear import QuantLinear
from dirotq.tuning.timing import Timing

BEGIN, END = "<!-- begin: make bench-flux -->", "<!-- end: make bench-flux -->"
SMALL = {model: SIZES[model] for model in ("flux", "pixart_sigma", "sana")}


def row(**changes):
    fields = {"section": "forward", "case": str(MAIN), "contestant": FUSED, "value": 80.0}
    fields |= {"p20": 79.0, "p80": 81.0, "first_s": 2.0, "weights": FOLDER}
    about = {"run": "1", "gpu": "H", "torch": "2", "triton": "3", "git": "abc"}
    return Row(**fields | about | changes)


def plain(section="forward", **changes):
    return row(section=section, p20=None, p80=None, first_s=None, **changes)


def verdicts(*rows):
    return {a.what: a.verdict(a.find(rows)) for a in ASKED}


@pytest.fixture
def narrow(monkeypatch):
    narrowed(monkeypatch)


def test_later_rows_win_and_a_failure_shows_only_where_nothing_is_known():
    old, new, failed = row(value=90.0), row(), plain(value=None, note="failed", run="2")
    silent = plain(contestant=FP8, value=None, note="not run")
    assert latest([old, new, failed, silent, silent]) == [new, silent]


def test_ratios_are_taken_within_one_run():
    rows = [row(), row(contestant=EAGER, value=160.0, run="1"), row(value=40.0, run="2")]
    assert ratio(rows, str(MAIN), FUSED, EAGER) == (2.0, FOLDER)
    assert ratio(rows[1:], str(MAIN), FUSED, EAGER) is None


def test_verdicts():
    eager = row(contestant=EAGER, value=150.0)
    assert verdicts(row())["FLUX.1 forward, 1024², batch 1"] == "reached"
    assert verdicts(row(value=76.0))["FLUX.1 forward, 1024², batch 1"] == "goal"
    assert verdicts(row(value=91.0))["FLUX.1 forward, 1024², batch 1"] == "**missed**"
    assert verdicts(row(), eager)["the same against eager bf16"] == "**missed**"
    assert verdicts(row(value=70.0), eager)["the same against eager bf16"] == "reached"
    assert verdicts(eager)["FLUX.1 forward, 1024², batch 1"] == "not measured"


def test_synthetic_weights_do_not_count():
    said = verdicts(row(weights=SYNTHETIC), row(contestant=EAGER, value=800.0, weights=SYNTHETIC))
    assert said["the same against eager bf16"] == "synthetic: does not count"


def test_verdicts_on_bytes_presets_and_images():
    said = verdicts(
        row(),
        row(contestant=W4A8, value=84.5),
        plain("weights", value=6.4),
        plain("weights", contestant=FP8, value=15.2, weights=""),
        plain("peak", value=7.7),
        plain("quality", case="tiny_flux", value=30.0),
        plain("quality", case="tiny_flux", contestant="ours, unfused, batch 8", value=30.1),
    )
    assert said["its weights, times those of FP8"] == "reached"
    assert said["transformer weights"] == "reached"
    assert said["peak VRAM of a forward, 1024²"] == "**missed**"
    assert said["W4A8 against W4A4, time apart"] == "**missed**"
    assert said["images: fused closer than batch 8 by"] == "**missed**"


def test_tables():
    rows = [
        row(),
        row(contestant=EAGER, value=160.0, p20=158.0, p80=165.0, weights=""),
        *(plain(section, value=value) for section, value in
          (("weights", 6.4), ("peak", 7.4), ("reserved", 7.9))),
        plain("profile", what="GEMM", value=50.0),
        plain("profile", what="attention", value=24.0),
        plain("profile", what="rope", value=4.0),
        plain("profile", what="launch gaps", value=2.0),
        plain("floor", contestant=FLOOR, what="GEMM", value=40.0, note="at 1500 TFLOP/s"),
        plain("floor", contestant=FLOOR, what="attention", value=23.0),
        plain("floor", contestant=FLOOR, what="bytes", value=3.0),
        plain(contestant=FP8, value=None, note="failed: a | b"),
    ]  # fmt: skip
    text = tables(rows)
    assert "| flux 1024x1 | 80.0 [79.0, 81.0] | 160.0 [158.0, 165.0] |  | 2.00 |  |" in text
    assert "| flux 1024x1 | ours, fused + CUDA graph | 6.40 | 1.00 | 7.40 | 7.90 |" in text
    assert "| GEMM | 40.00 | 50.00 | 10.00 | at 1500 TFLOP/s |" in text
    assert "| bytes | 3.00 | 4.00 | 1.00 |  |" in text
    assert "| **all** | 66.00 | 80.00 | 14.00 |" in text
    assert "failed: a \\| b" in text
    assert text.rstrip().splitlines()[-1].startswith("- H; torch 2, triton 3; abc, 1 UTC")
    for block in text.split("\n\n"):
        lines = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, block


def test_rows_of_an_earlier_run_are_published(monkeypatch, tmp_path, capsys):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "speed.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    append(tmp_path / "rows.csv", [row(), row(run="2", value=1.0, weights=SYNTHETIC)])
    monkeypatch.setattr(flux, "ROOT", tmp_path)
    assert flux.main(["--from", str(tmp_path / "rows.csv"), "--write"]) == 0
    text = (docs / "speed.md").read_text()
    assert text.startswith(f"before\n{BEGIN}\n### ")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert read(docs / "speed.csv", Row) == [row()]
    assert "synthetic weights, does not count" in capsys.readouterr().out


def test_the_document_is_what_its_rows_give(request):
    root = request.config.rootpath
    text = (root / "docs" / "speed.md").read_text()
    generated = text.partition(BEGIN)[2].partition(END)[0].lstrip("\n")
    assert generated == tables(read(root / "docs" / "speed.csv", Row))


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert flux.main(["forward"]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err


def test_words_of_the_command_line(capsys):
    options = flux.parsed(["fp8", "forward", "capture.vram=24GB", "--minutes", "3"])
    assert options.jobs == ["forward", "fp8"]
    assert options.overrides == ("capture.vram=24GB",)
    assert flux.parsed([]).jobs == list(JOBS)
    with pytest.raises(SystemExit):
        flux.parsed(["forwards"])
    assert "unknown: forwards; there are forward, " in capsys.readouterr().err


def test_jobs_that_do_not_fit_are_listed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(flux, "machine", lambda revision: {})
    path = tmp_path / "rows.csv"
    flux.measure(flux.parsed(["forward", "floor", "--minutes", "0.1", "--csv", str(path)]))
    said = read(path, Row)
    assert [(r.contestant, r.value) for r in said] == [(FUSED, None), (EAGER, None), (FLOOR, None)]
    assert said[0].note.startswith("not run: ")
    assert "not run" in capsys.readouterr().out


def test_a_lost_gpu_ends_the_run_and_names_the_jobs_left(monkeypatch, tmp_path):
    monkeypatch.setattr(flux, "machine", lambda revision: {})
    monkeypatch.setattr(sessions, "healthy", lambda: False)
    monkeypatch.setitem(JOBS, "forward", dataclasses.replace(JOBS["forward"], run=lambda s: None))
    options = flux.parsed(["forward", "floor", "fp8", "--csv", str(tmp_path / "rows.csv")])
    with pytest.raises(SystemExit, match=r"forward lost the GPU.*left to run: floor fp8"):
        flux.measure(options)


@pytest.mark.parametrize("model", SMALL)
@torch.no_grad()
def test_synthetic_packing_runs_on_the_reference_path(narrow, model):
    packed = contestants.random_packed(model, "cpu", rank=16)
    original = contestants.random_bf16(model, "cpu")
    sites = [m for m in packed.modules() if isinstance(m, QuantLinear)]
    assert len(sites) == len(packed.hf_quantizer.quantization_config.sites) > 0
    x = inputs(SMALL[model], packed.config, "cpu")
    y, want = packed(**x)[0], original(**x)[0]
    assert y.shape == want.shape
    assert y.isfinite().all()
    assert y.std() > 1e-3
    assert contestants.weight_bytes(packed) < 0.6 * contestants.weight_bytes(original)


@torch.no_grad()
def test_fp8_takes_the_place_of_the_linears_in_blocks(narrow, monkeypatch):
    monkeypatch.setattr(contestants, "find_spec", lambda name: None)
    original = contestants.random_bf16("flux", "cpu")
    x = inputs(SMALL["flux"], original.config, "cpu")
    want, before = original(**x)[0].float(), contestants.weight_bytes(original)
    fp8 = contestants.fp8_blocks(original)
    got = fp8(**x)[0].float()
    assert (got - want).norm() < 0.1 * want.norm()
    assert 0.5 * before < contestants.weight_bytes(fp8) < 0.8 * before
    assert isinstance(fp8.transformer_blocks[0].norm1.linear, torch.nn.Linear)


def test_the_w4a8_preset_has_other_activations(narrow):
    packed = contestants.random_packed("flux", "cpu", preset="dirotq_w4a8", rank=16)
    specs = [m.spec for m in packed.modules() if isinstance(m, QuantLinear)]
    assert {(s.activations.bits, s.activations.name) for s in specs} == {(8, "rms"), (16, "token")}


@pytest.fixture
def session(narrow, monkeypatch):
    """A session on the CPU: nothing is compiled, and the clock stands still."""
    monkeypatch.setattr(contestants, "find_spec", lambda name: None)
    monkeypatch.setattr(contestants, "compile_blocks", lambda module: module)
    monkeypatch.setattr(contestants, "uncompiled", lambda module: module)
    monkeypatch.setattr(contestants, "free", lambda: None)

    def timed(module, x):
        with torch.no_grad():
            y = module(**x)[0]
        return Forward(Timing(9.0, 10.0, 11.0), 0.5, 10**9, 2 * 10**9, y)

    monkeypatch.setattr(sessions.forward_timing, "timed", timed)
    places = Places(models=None, store="", synthetic=True)
    return Session(places, lambda row: None, device="cpu")


def test_a_session_goes_from_one_contestant_to_the_next(session):
    case = SMALL["flux"]
    for who in (UNFUSED, EAGER, COMPILED, FP8, EAGER):
        session.forward(who, case)
    times = [r for r in session.rows if r.section == "forward"]
    assert [r.contestant for r in times] == [UNFUSED, EAGER, COMPILED, FP8]
    assert all(r.value == 10.0 and r.case == "flux 64x1" for r in times)
    errors = {(r.contestant, r.what): r.value for r in session.rows if r.section == "error"}
    assert errors[COMPILED, f"against {EAGER}"] == 0.0
    assert 0 < errors[FP8, f"against {EAGER}"] < 0.1
    assert len(errors) == 2  # random codes are another network


def test_a_contestant_that_fails_costs_its_own_rows(session, monkeypatch):
    tries = []

    def ours(module, **how):
        tries.append(how)
        if how[COMPILE]:
            raise RuntimeError("no kernel\nfor this")
        return module

    monkeypatch.setattr(dirotq, "accelerate", ours)
    for batch in (1, 2):
        session.forward(FUSED, Case("flux", 64, batch))
    session.forward(UNFUSED, SMALL["flux"])
    notes = [r.note for r in session.rows if r.value is None]
    assert notes[0] == "failed: RuntimeError: no kernel for this"
    assert "as before" in notes[1]
    assert [how[COMPILE] for how in tries] == [True, False]
    assert any(r.section == "forward" and r.contestant == UNFUSED for r in session.rows)


def test_work_of_flux():
    work = flux_floor.work(1024)
    assert work.linear_flops == pytest.approx(59.5e12, rel=0.01)
    assert work.attention == (1, 24, 4608, 128)
    assert work.attentions == 57
    assert sum(work.shapes.values()) == 19 * 8 + 38 * 2
    assert flux_floor.columns(3072) == 3328
    assert flux_floor.work(1024, 2).linear_flops == 2 * work.linear_flops


def test_images_of_the_embedded_model_are_compared_in_four_ways(monkeypatch, tmp_path):
    calls = []

    def generate(pipe, prompts, call):
        calls.append((pipe.how, len(prompts), call["height"]))
        far = {("plain", 1): 0.0, ("plain", 2): 0.1, ("fused", 1): 0.01, ("fp8", 1): 0.2}
        return torch.full((len(prompts), 3, 8, 8), 0.5 + far[pipe.how, len(prompts)])

    def ours(transformer, *, graphs, attention, **more):
        plain = not (more[COMPILE] or graphs)
        pipe.how = "plain" if plain else {"exact": "fused"}.get(attention, "fp8")

    made = types.SimpleNamespace(folder=tmp_path)
    pipe = types.SimpleNamespace(transformer="packed", how="as loaded")
    monkeypatch.setattr(dirotq, "compress", lambda *overrides, **chosen: made)
    monkeypatch.setattr(dirotq, "load", lambda folder, dtype: pipe)
    monkeypatch.setattr(flux_quality, "generate", generate)
    monkeypatch.setattr(dirotq, "accelerate", ours)
    batched, fused, eight_bits = flux_quality.compared("store", count=2)
    assert batched.value == pytest.approx(20, abs=0.01)
    assert fused.value == pytest.approx(40, abs=0.01)
    assert eight_bits.value == pytest.approx(14, abs=0.03)
    ways = [("plain", 1)] * 2 + [("plain", 2)] + [("fused", 1)] * 2 + [("fp8", 1)] * 2
    assert calls == [(*way, 128) for way in ways]
    assert verdicts(batched, fused)["images: fused closer than batch 8 by"] == "reached"
