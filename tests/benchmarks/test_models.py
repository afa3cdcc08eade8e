"""`make bench-models`: every family's inputs and ways on the CPU, tables, rows that survive."""

import dataclasses
import sys

import pytest
import torch
from narrow_models import NARROW, SIZES, SMALL, narrowed

import dirotq
from dirotq.benchmarks import contestants, full_size, model_jobs, models, ways, whole_images
from dirotq.benchmarks import session as sessions
from dirotq.benchmarks.forward_rows import COMPILED, EAGER, FP8, Row
from dirotq.benchmarks.forward_timing import Forward, call
from dirotq.benchmarks.kernel_categories import Kernel
from dirotq.benchmarks.model_inputs import Case, inputs
from dirotq.benchmarks.model_jobs import CASES, CONTESTANTS, FEWER, order
from dirotq.benchmarks.models_table import ASKED, tables
from dirotq.benchmarks.published import append, read
from dirotq.benchmarks.session import Places, Session
from dirotq.benchmarks.ways import (
    COMPILE,
    EAGER_OFFLOADED,
    OFFLOADED,
    PACKED,
    PACKED_ATTENTION,
    PLAIN,
)
from dirotq.benchmarks.whole_images import DECODER, TEXT
from dirotq.kernels.linear import QuantLinear
from dirotq.tuning.timing import Timing

BEGIN, END = "<!-- begin: make bench-models -->", "<!-- end: make bench-models -->"


def row(**changes):
    fields = {"section": "forward", "case": "flux 1024x1", "contestant": PACKED, "value": 80.0}
    fields |= {"p20": 79.0, "p80": 81.0, "first_s": 30.0, "weights": models.RANDOM}
    about = {"run": "1", "gpu": "H", "torch": "2", "triton": "3", "git": "abc"}
    return Row(**fields | about | changes)


def number(section, value, **changes):
    return row(section=section, value=value, p20=None, p80=None, first_s=None, **changes)


def verdicts(*rows):
    return {a.what: a.verdict(a.find(rows)) for a in ASKED}


@pytest.fixture
def narrow(monkeypatch):
    narrowed(monkeypatch)


@pytest.fixture
def session(narrow, monkeypatch):
    """A session on the CPU: nothing is compiled, and the clock stands still."""
    monkeypatch.setattr(contestants, "find_spec", lambda name: None)
    monkeypatch.setattr(contestants, "compile_blocks", lambda module: module)
    monkeypatch.setattr(contestants, "uncompiled", lambda module: module)
    monkeypatch.setattr(contestants, "free", lambda: None)

    def timed(module, x):
        return Forward(Timing(9.0, 10.0, 11.0), 0.5, 10**9, 2 * 10**9, call(module, x))

    monkeypatch.setattr(sessions.forward_timing, "timed", timed)
    return Session(Places(models=None, store="", synthetic=True), lambda row: None, device="cpu")


@pytest.mark.parametrize("model", NARROW)
def test_every_family_runs_packed_as_in_16_bits(narrow, model):
    packed = contestants.random_packed(model, "cpu", rank=16)
    original = contestants.random_bf16(model, "cpu")
    x = inputs(SIZES[model], packed.config, "cpu")
    y, want = call(packed, x), call(original, x)
    assert any(isinstance(m, QuantLinear) for m in packed.modules())
    assert y.shape == want.shape
    assert y.isfinite().all()
    assert y.std() > 1e-3


@pytest.mark.parametrize("model", NARROW)
def test_every_family_runs_in_fp8(narrow, monkeypatch, model):
    monkeypatch.setattr(contestants, "find_spec", lambda name: None)
    original = contestants.random_bf16(model, "cpu")
    x = inputs(SIZES[model], original.config, "cpu")
    want = call(original, x).float()
    got = call(contestants.fp8_blocks(original), x).float()
    assert 0 < (got - want).norm() < 0.1 * want.norm()


def test_wan_keeps_in_float32_what_its_class_keeps(narrow):
    for made in (contestants.random_bf16("wan", "cpu"), contestants.random_packed("wan", "cpu")):
        assert made.scale_shift_table.dtype == torch.float32
        assert made.blocks[0].norm2.weight.dtype == torch.float32
        assert made.rope.freqs_cos.dtype != torch.bfloat16
        assert made.patch_embedding.weight.dtype == torch.bfloat16


def test_every_architecture_is_measured_at_its_size():
    assert {case.model for case in CASES.values()} == set(full_size.ARCHITECTURES)
    wan = CASES["wan"]
    assert (wan.width, wan.side, str(wan)) == (832, 480, "wan 832x480x81")
    assert str(FEWER["wan_10"]) == "wan 832x480x81, 10 blocks"
    assert FEWER["wan_10"].changes == {"num_layers": 10}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("flux", (1, 4096, 64)),
        ("qwen_image", (1, 4096, 64)),
        ("sd3", (1, 16, 128, 128)),
        ("wan", (1, 16, 21, 60, 104)),  # 32,760 patches of 2 x 2
    ],
)
def test_published_sizes(name, shape):
    config = contestants._skeleton(name, {}, buffers=False).config
    assert inputs(CASES[name], config, "cpu")["hidden_states"].shape == shape


def test_contestants_of_one_network_follow_one_another():
    found = list(order(["flux_512", "sana", "flux"], [EAGER, PACKED, PLAIN]))
    assert found == [
        (PACKED, CASES["flux_512"]), (PACKED, CASES["flux"]), (PLAIN, CASES["flux_512"]),
        (EAGER, CASES["flux_512"]), (EAGER, CASES["flux"]),
        (PACKED, CASES["sana"]), (PLAIN, CASES["sana"]), (EAGER, CASES["sana"]),
    ]  # fmt: skip


def test_every_contestant_runs(session, monkeypatch):
    made = []
    for name in ("random_bf16", "random_packed"):
        real = getattr(contestants, name)
        monkeypatch.setattr(
            contestants, name, lambda *a, real=real, **k: made.append(real) or real(*a, **k)
        )
    case = SIZES["flux"]
    for who in CONTESTANTS.values():
        session.forward(who, case)
    failed = [(r.contestant, r.note) for r in session.rows if r.value is None]
    assert failed == []
    times = [r.contestant for r in session.rows if r.section == "forward"]
    assert times == list(CONTESTANTS.values())
    # One packed network for all ways to run it, but for integers; in 16 bits a new one where FP8
    # spoiled it.
    assert [f.__name__ for f in made] == [*["random_packed"] * 2, *["random_bf16"] * 2]
    errors = {(r.contestant, r.what): r.value for r in session.rows if r.section == "error"}
    assert errors[PLAIN, f"against {PACKED}"] < 0.1
    assert errors[COMPILED, f"against {EAGER}"] == 0.0


@pytest.mark.parametrize("how", [{}, ways.SLOW])
@pytest.mark.parametrize("model", ["flux", "z_image"])
def test_an_adapter_adds_to_every_linear_and_goes_again(narrow, monkeypatch, model, how):
    transformer = contestants.random_packed(model, "cpu", rank=16)
    x = inputs(SIZES[model], transformer.config, "cpu")
    asked = ways.accelerated(**how)
    asked(transformer, SIZES[model])
    want = call(transformer, x)
    undo = ways.adapted(asked)(transformer, SIZES[model])
    wrapped = [m for m in transformer.modules() if isinstance(m, ways.Adapted)]
    assert len(wrapped) == len(contestants.linears_in_blocks(model, {})) > 8
    ran = []
    for adapter in wrapped:
        adapter.register_forward_hook(lambda module, given, y: ran.append(module))
    changed = call(transformer, x)
    assert set(ran) == set(wrapped)
    assert 0 < (changed - want).norm() < 0.5 * want.norm()
    undo()
    assert torch.equal(call(transformer, x), want)


def test_what_is_switched_off_stays_off_only_for_its_way(narrow):
    transformer = contestants.random_packed("flux", "cpu", rank=16)
    ways.WAYS[PLAIN].apply(transformer, SIZES["flux"])
    slow = dirotq.runtime.accelerate.runtime_of(transformer)
    assert (getattr(slow, COMPILE), slow.graphs) == (False, False)
    ways.WAYS[PACKED].apply(transformer, SIZES["flux"])
    assert dirotq.runtime.accelerate.runtime_of(transformer) == dirotq.runtime.accelerate.Runtime()


@pytest.mark.parametrize("model", ["flux", "z_image"])
def test_whole_images_and_their_parts(session, model):
    made = whole_images.whole(model, "cpu", SMALL)
    made = dataclasses.replace(made, call=made.call | {"num_inference_steps": 2})
    session.image(PACKED, SIZES[model], lambda: made)
    session.image(EAGER, SIZES[model], lambda: made)
    found = [(r.contestant, r.what, r.note) for r in session.rows]
    assert found == [(who, p, "") for who in (PACKED, EAGER) for p in ("", TEXT, DECODER)]
    whole = {(r.contestant, r.what): r.value for r in session.rows}
    assert whole[PACKED, ""] > whole[PACKED, TEXT] > 0


def test_tables():
    rows = [
        row(),
        row(contestant=EAGER, value=160.0, weights="", first_s=0.4),
        row(contestant=COMPILED, value=120.0, weights=""),
        row(contestant=PACKED_ATTENTION, value=75.0),
        row(contestant=PLAIN, value=150.0),
        row(contestant=OFFLOADED, value=200.0),
        row(contestant=EAGER_OFFLOADED, value=500.0, weights=""),
        row(case="sana 1024x1", value=10.0),
        number("warm", 4.0),
        number("profile", 50.0, what="GEMM"),
        number("weights", 6.5),
        number("peak", 7.4),
        number("image", 3.0),
        number("image", 0.1, what=TEXT),
        number("image", 6.0, contestant=EAGER),
        number("forward", None, contestant=FP8, note="failed: a | b"),
    ]
    text = tables(rows)
    time = "{0}.0 [79.0, 81.0]"
    times = [time.format(ms) for ms in (160, 120)]
    assert (
        f"| flux 1024x1 | {' | '.join(times)} |  | {time.format(80)} | {time.format(75)} |" in text
    )
    assert " | 2.00 | 1.50 |  | 1.60 |" in text
    assert f"| {PLAIN} | 150.0 [79.0, 81.0] | {EAGER} | 160.0 [79.0, 81.0] | 1.07 |" in text
    assert f"| {OFFLOADED} | 200.0 [79.0, 81.0] | {EAGER_OFFLOADED} | 500.0" in text
    assert f"| flux 1024x1 | {PACKED} | 3.00 | 0.10 |  | 2.00 |  |" in text
    assert f"| {PACKED} | {PACKED_ATTENTION} | {PLAIN} | {OFFLOADED} |" in text
    assert "6.50, 7.40" in text
    assert "| GEMM | 50.00 |" in text
    assert "failed: a \\| b" in text
    assert "does not count" not in text
    for block in text.split("\n\n"):
        lines = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, block


def test_verdicts_stand_on_both_sides():
    eager = row(contestant=EAGER, value=160.0, weights="")
    name = "flux 1024x1, against eager"
    assert verdicts(row(value=80.1), eager)[name] == "**missed**"
    assert verdicts(row(value=80.0), eager)[name] == "reached"
    assert verdicts(row(value=74.0), eager)[name] == "goal"
    slow = row(case="sana 1024x1", contestant=PLAIN, value=41.0)
    other = row(case="sana 1024x1", contestant=EAGER, value=40.0, weights="")
    least = "the least of all without graph and compiler, against eager"
    assert verdicts(row(contestant=PLAIN, value=100.0), eager)[least] == "goal"
    assert verdicts(row(contestant=PLAIN, value=100.0), eager, slow, other)[least] == "**missed**"
    first = "first call of FLUX.1, nothing compiled on disk"
    assert verdicts(row(first_s=40.0))[first] == "reached"
    assert verdicts(row(first_s=40.5))[first] == "**missed**"
    assert verdicts(number("warm", 5.5))["the same, compiled code on disk"] == "**missed**"


def test_nothing_measured_yet_is_said():
    assert tables([]) == "No row was measured yet.\n"


def test_rows_of_an_earlier_run_are_published(monkeypatch, tmp_path, capsys):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "speed.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    append(tmp_path / "rows.csv", [row(value=90.0), row()])
    append(tmp_path / "more.csv", [row(case="sana 1024x1", run="2")])
    monkeypatch.setattr(models, "ROOT", tmp_path)
    files = [str(tmp_path / name) for name in ("rows.csv", "more.csv")]
    assert models.main(["--write", "--from", *files]) == 0
    text = (docs / "speed.md").read_text()
    assert text.startswith(f"before\n{BEGIN}\n### ")
    assert text.endswith(f"{END}\nafter\n")
    assert read(docs / "models.csv", Row) == [row(), row(case="sana 1024x1", run="2")]


def test_the_document_is_what_its_rows_give(request):
    docs = request.config.rootpath / "docs"
    text = (docs / "speed.md").read_text()
    generated = text.partition(BEGIN)[2].partition(END)[0].lstrip("\n")
    stored = docs / "models.csv"
    assert generated == tables(read(stored, Row) if stored.exists() else [])


def test_words_of_the_command_line(capsys):
    options = models.parsed(["flux", "wan_10", "--contestants", "packed,bf16", "--warm"])
    assert (options.cases, options.contestants) == (["flux", "wan_10"], ["packed", "bf16"])
    every = models.parsed([])
    assert every.cases == [*CASES, *model_jobs.IMAGES]
    assert every.contestants == list(CONTESTANTS)
    for wrong in (["fluxx"], ["flux", "--contestants", "packed,fp9"]):
        with pytest.raises(SystemExit):
            models.parsed(wrong)
    assert "unknown: fp9; there are packed, " in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.main(["flux"]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err


@pytest.fixture
def measured(session, monkeypatch, tmp_path):
    """What runs the command on the CPU, and reads its rows."""
    monkeypatch.setattr(models, "machine", lambda revision: {"gpu": "none"})
    monkeypatch.setattr(sessions, "healthy", lambda: True)
    monkeypatch.setattr(models, "empty_caches", lambda: None)
    monkeypatch.setattr(
        sessions, "Session", lambda places, say: dataclasses.replace(session, say=say)
    )
    monkeypatch.setitem(CASES, "flux", Case("flux", 64))
    path = tmp_path / "rows.csv"

    def run(*words):
        models.measure(models.parsed([*words, "--csv", str(path)]))
        return read(path, Row)

    run.path = path
    return run


def test_rows_of_a_killed_run_are_kept(measured, monkeypatch):
    def killed(*call):
        raise KeyboardInterrupt

    monkeypatch.setitem(ways.WAYS, EAGER, ways.Way(ways.BF16, killed))
    with pytest.raises(KeyboardInterrupt):
        measured("flux", "--contestants", "packed,bf16")
    rows = read(measured.path, Row)
    assert [(r.section, r.contestant) for r in rows[:2]] == [
        ("forward", PACKED),
        ("weights", PACKED),
    ]
    assert {r.weights for r in rows} == {models.RANDOM}
    assert len({r.run for r in rows}) == 1


def test_what_does_not_fit_is_listed(measured):
    rows = measured("flux", "flux_images", "--contestants", "packed,bf16", "--minutes", "0.1")
    assert [(r.section, r.contestant, r.value) for r in rows] == [
        (section, who, None) for section in ("forward", "image") for who in (PACKED, EAGER)
    ]
    assert rows[0].note.startswith("not run: ")


def test_whole_images_by_name(measured, monkeypatch):
    made = whole_images.whole("flux", "cpu", SMALL)
    made = dataclasses.replace(made, call=made.call | {"num_inference_steps": 2})
    monkeypatch.setattr(whole_images, "whole", lambda model, device: made)
    rows = measured("flux_images", "--contestants", "packed,plain,bf16")
    assert {(r.section, r.case) for r in rows} == {("image", "flux 64x1")}
    assert [r.contestant for r in rows if r.what == ""] == [PACKED, EAGER]


def test_whole_images_that_cannot_be_made_cost_their_rows_alone(measured, monkeypatch):
    def lost(model, device):
        raise RuntimeError("no room")

    monkeypatch.setattr(whole_images, "whole", lost)
    rows = measured("flux_images", "flux", "--contestants", "bf16")
    assert [(r.section, r.note) for r in rows if r.value is None] == [
        ("image", "failed: RuntimeError: no room")
    ]


def test_a_lost_gpu_ends_the_run(measured, monkeypatch):
    monkeypatch.setattr(sessions, "healthy", lambda: False)
    with pytest.raises(SystemExit, match=r"lost to this process before packed, flux 64x1"):
        measured("flux")


def test_packed_kernels_are_profiled_where_that_is_asked_for(measured, monkeypatch):
    seen = [Kernel("nvjet_gemm", 0.0, 2000.0)]
    monkeypatch.setattr(sessions.forward_timing, "kernels", lambda module, x: seen)
    rows = measured("flux", "--contestants", "packed,bf16", "--profile")
    profile = {(r.contestant, r.what): r.value for r in rows if r.section == "profile"}
    assert profile == {(PACKED, "GEMM"): 2.0, (PACKED, "launch gaps"): 8.0}


def test_first_calls_are_timed_again_in_a_second_process(measured, monkeypatch):
    monkeypatch.setattr(sessions.forward_timing, "first", lambda module, x: (3.0, None))
    commands = []

    def second(command, check):
        commands.append(command)
        models.measure(models.parsed(command[2:]))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(models.subprocess, "run", second)
    rows = measured("flux", "--contestants", "packed,plain,bf16", "--warm")
    assert commands[0][:3] == [sys.executable, models.__file__, "flux"]
    warm = [r for r in rows if r.section == "warm"]
    assert [(r.contestant, r.value) for r in warm] == [(PACKED, 3.0)]
    assert len({r.run for r in rows}) == 1
