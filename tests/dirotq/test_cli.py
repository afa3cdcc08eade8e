import json
import os
import re
import signal
import subprocess
import time

import pytest

from dirotq.cli import command_line, main
from dirotq.errors import ConfigError
from dirotq.pipeline import compress, explain


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


def test_compress_tells_what_it_did(dirotq, store):
    first = dirotq("compress")
    assert first.status == 0
    total = next(artifact for artifact in store.list() if artifact.stage == "total")
    told = [f"packed model {total.data / 'model'}", f"report       {total.data / 'report.html'}"]
    assert first.out.splitlines() == told
    assert "] 3 to run; never run here: numbers, squares, total\n" in first.err
    again = dirotq("compress", "-v")
    assert again.out.count("cached") == 3
    assert "total=14" in again.out
    assert again.out.splitlines()[-3:-1] == told
    assert "] everything is cached\n" in again.err


def test_a_run_that_stops_early_says_where_it_stopped(dirotq, store):
    found = dirotq("compress", "until=squares")
    (squares,) = (artifact for artifact in store.list() if artifact.stage == "squares")
    assert found.out == f"squares      {squares.data}\n"


@pytest.mark.parametrize("verb", ["compress", "plan", "explain"])
def test_something_is_said_before_the_settings_are_read(dirotq, monkeypatch, verb):
    def late(*_, **__):
        raise ConfigError("late")

    for module in (compress, explain):
        monkeypatch.setattr(module, "compose_config", late)
    assert dirotq(verb).err == "reading the settings and the model ...\ndirotq: late\n"
    assert dirotq("compress", "--cfg", "job").err == "dirotq: late\n"


def test_threads_wait_asleep_unless_told_otherwise(dirotq, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    dirotq("list")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    dirotq("list")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_forty_columns_without_colours(monkeypatch):
    env = {**os.environ, "COLUMNS": "40", "TERM": "dumb", "NO_COLOR": "1"}
    for words in (["--help"], ["plan", "--help"], ["plann"]):
        done = subprocess.run(
            [os.sys.executable, "-m", "dirotq", *words],
            capture_output=True, text=True, check=False, env=env,
        )  # fmt: skip
        assert done.returncode == (2 if words == ["plann"] else 0)
        assert "\x1b" not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_a_run_leaves_its_configuration_log_and_artifacts(dirotq, store):
    dirotq("compress", "squares.power=3")
    (run,) = (store.root / "runs").iterdir()
    assert "power: 3" in (run / ".hydra" / "config.yaml").read_text()
    assert "squares" in (run / "dirotq.log").read_text()
    named = json.loads((run / "artifacts.json").read_text())
    assert set(named.values()) == {str(artifact) for artifact in store.list()}
    provenance = store.find(named["squares"]).provenance
    assert provenance["overrides"] == ["squares.power=3"]
    assert provenance["libraries"]["hydra-core"]


def test_plan_touches_nothing_and_knows_the_past(dirotq, store):
    fresh = dirotq("plan")
    assert fresh.status == 0
    assert fresh.out.count("to run") == 4
    assert "3 to run; never run here: numbers, squares, total\n" in fresh.out
    assert not store.root.exists()
    dirotq("compress")
    planned = dirotq("plan", "squares.power=3")
    assert [line.split()[:2] for line in lines(planned.out)[1:4]] == [
        ["numbers", "cached"],
        ["squares", "to"],
        ["total", "to"],
    ]
    assert "2 to run; about 0 s, going by the last time\n" in planned.out
    assert "everything is cached" in dirotq("plan").out
    assert "squares  to run" in dirotq("plan", "force=squares").out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (
            ["compress", "squares.powr=3"],
            "no such setting; did you mean `squares.power`? squares has",
        ),
        (["plan", "squares.powr=3"], "squares.powr: there is no such setting"),
        (["compress", "squares=nix"], "squares=nix: there is no such choice; squares has default"),
        (["compress", "model=nix"], "Known models are large, local, small"),
        (["compress", "model=local"], "model.path has no value; set it with model.path="),
        (["compress", "squares.power=5"], "squares.power=5: allowed are 2 and 3"),
        (["compress", "squares.power=[1"], "squares.power=[1 is no setting that can be read"),
        (["compress", "until=nix"], "'nix' is no stage"),
        (["compress", "numbers.trouble=numbers"], "site blocks.3.ff: activations hold 7"),
        (["compress", "numbers.trouble=disk"], "the disk is full: writing numbers/"),
        (["compress", "numbers.trouble=wrapped"], "the disk is full: writing numbers/"),
        (
            ["compress", "numbers.trouble=interrupt"],
            "interrupted in numbers; finished work is",
        ),
        (["compress", "-m", "squares.power=2,5"], "squares.power=5: allowed are 2 and 3"),
        (["compress", "store=s3://bucket"], "store_remote=s3://bucket"),
        (["verify", "rank/abc"], "no artifact matches 'rank/abc'"),
        (["explain", "a"], "explain takes two artifacts"),
        (["generate", "nix", "--prompt", "x"], "no artifact matches 'nix'"),
        (["compres"], "Did you mean `compress`?"),
    ],
)
def test_bad_input_is_one_paragraph_and_status_2(dirotq, args, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = dirotq(*args)
    assert result.status == 2
    assert says in result.err
    assert "Traceback" not in result.err
    assert "dirotq: " in result.err
    assert {path.name for path in tmp_path.iterdir()} <= {"store"}  # nothing beside the store


def test_traceback_on_demand(dirotq, monkeypatch):
    monkeypatch.setenv("DIROTQ_DEBUG", "1")
    result = dirotq("compress", "squares.power=5")
    assert result.status == 2
    assert "Traceback" in result.err
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_a_bug_is_one_paragraph_with_its_stage_and_status_1(dirotq):
    found = dirotq("compress", "numbers.trouble=bug")
    assert found.status == 1
    assert "a fault of DiRotQ or of a library that it uses: RuntimeError: boom (in stage numb" in (
        found.err
    )
    assert "Traceback" not in found.err
    shown = dirotq("compress", "--debug", "numbers.trouble=bug")
    assert (shown.status, "Traceback" in shown.err) == (1, True)


def test_trouble_costs_nothing_that_was_done(dirotq, tmp_path):
    ledger = tmp_path / "ledger"
    assert dirotq("compress", "numbers.trouble=disk", f"numbers.ledger={ledger}").status == 2
    assert dirotq("compress", f"numbers.ledger={ledger}").status == 0
    assert ledger.read_text().split() == ["0", "1", "2", "3"]  # each computed once


VERBS = (
    "compress", "plan", "explain", "sites", "list", "compare", "push", "pull", "verify",
    "gc", "generate", "export", "tune", "doctor",
)  # fmt: skip


def test_help_names_every_verb(dirotq):
    for args in ([], ["--help"], ["-h"], ["help"]):
        result = dirotq(*args)
        assert (result.status, result.err) == (0, "")
        assert re.findall(r"^    (\w+) {2,}\w", result.out, re.MULTILINE) == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_usage_options_and_examples(dirotq, verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])  # of the real tree
    out, err = capsys.readouterr()
    assert (left.value.code, err) == (0, "")
    assert out.startswith(f"usage: dirotq {verb} ")
    assert "\noptions:\n" in out
    assert re.search(rf"^examples:\n  dirotq {verb}", out, re.MULTILINE)
    text = out.partition("\ngroups (")[0]
    assert all(len(line) <= 100 for line in text.splitlines())
    assert dirotq(verb, "-h").status == 0


def test_help_of_compress_lists_the_groups(dirotq):
    assert "\n  model: large, local, small\n" in dirotq("compress", "--help").out


def test_hydras_own_options(dirotq, store, tmp_path):
    printed = dirotq("compress", "squares.power=3", "--cfg", "job", "until=squares")
    assert printed.status == 0
    assert "power: 3\n" in printed.out and "until: squares\n" in printed.out
    assert dirotq("compress", "--cfg", "job", "-p", "squares").out.startswith("# @package squares")
    assert "SUPPRESS" not in dirotq("compress", "--hydra-help").out
    assert "Flags" in dirotq("compress", "--hydra-help").out
    assert "searchpath" in dirotq("compress", "--info", "searchpath").out.lower().replace(" ", "")
    for args in (["-m", "--cfg", "job"], ["--run", "--info"]):
        both = dirotq("compress", *args)
        assert (both.status, "not allowed with" in both.err) == (2, True)
    assert "--resolve goes with --cfg only" in dirotq("compress", "--resolve").err
    assert not store.root.exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["gc", "--kep", "3"], "unrecognized arguments: --kep 3; did you mean `--keep`?"),
        (["verify", "--remov3"], "did you mean `--remove`?"),
        (["compress", "a=1", "--multirn"], "arguments: --multirn; did you mean `--multirun`?"),
        (["doctor", "x"], "dirotq doctor: error: unrecognized arguments: x\n"),
        (["plan", "--cfg", "job"], "--cfg is an option of `dirotq compress` alone"),
    ],
)
def test_unknown_options(dirotq, args, says):
    result = dirotq(*args)
    assert (result.status, result.out) == (2, "")
    assert says in result.err


@pytest.mark.parametrize("verb", ["plan", "compress", "gc", "--help"])
def test_a_reader_that_has_read_enough_is_no_error(spawn, verb):
    process = spawn(verb)
    process.stdout.close()
    err = process.stderr.read()
    assert "dirotq: " not in err and "Error" not in err, err
    assert process.wait(timeout=60) == 0


def started(process, ledger, count):
    """Wait until the process has written ``count`` lines into its ledger."""
    deadline = time.monotonic() + 60
    while not (ledger.exists() and len(ledger.read_text().split()) >= count):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_stopped_in_the_middle_resumes_to_the_same_bytes(spawn, dirotq, store, tmp_path, how):
    ledger = tmp_path / "ledger"
    args = ["compress", "numbers.count=6", f"numbers.ledger={ledger}"]
    process = spawn(*args, "numbers.pause=0.5")
    started(process, ledger, 3)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    if how is signal.SIGINT:
        assert process.returncode == 2
        assert "interrupted in numbers" in err
        assert "Traceback" not in err
    assert store.list() == []
    assert dirotq(*args).status == 0
    assert len(ledger.read_text().split()) <= 6 + 1  # at most the one in flight again
    resumed = {str(artifact): artifact.manifest["files"] for artifact in store.list()}
    dirotq(*args, f"store={tmp_path / 'undisturbed'}")
    for name, files in resumed.items():
        manifest = tmp_path / "undisturbed" / name / "manifest.json"
        assert json.loads(manifest.read_text())["files"].items() <= files.items()


def test_two_processes_race_for_the_same_line(spawn, store, tmp_path):
    ledger = tmp_path / "ledger"
    args = ["compress", f"numbers.ledger={ledger}", "numbers.pause=0.3"]
    racers = [spawn(*args) for _ in range(2)]
    for racer in racers:
        out, err = racer.communicate(timeout=60)
        assert racer.returncode == 0, err
        assert "report       " in out
    assert sorted(ledger.read_text().split()) == ["0", "1", "2", "3"]  # one result, not two
    assert len(store.list()) == 3
    for artifact in store.list():
        store.verify(artifact)


def test_module_and_script_are_the_same_command():
    done = subprocess.run(
        [os.sys.executable, "-m", "dirotq", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == command_line()[0].format_help()
