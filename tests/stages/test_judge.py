"""The judge stage on small images, with artifacts of the form that reference and validate leave."""

import dataclasses
import json
import re
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny_line
import torch
from chat_server import answer, completion, serving
from hydra.utils import instantiate

from dirotq.errors import ConfigError
from dirotq.evaluate.images import ImageWriter
from dirotq.evaluate.judging.backend import Reply
from dirotq.pipeline import dag
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.executor import LocalExecutor
from dirotq.pipeline.stage import recipe
from dirotq.pipeline.store import ArtifactStore
from dirotq.sources.prompts import PromptSet

COUNT = 4
BRIGHTNESS = {"original": 0.5, "floor": 0.5, "packed": 0.4}


@dataclass(frozen=True, kw_only=True)
class Brighter:
    """Prefers the brighter image; stops after ``least`` questions, if told to."""

    calls: ClassVar[list[str]] = []
    least: int | None = None
    name: str = "brighter"
    concurrency: int = 1

    def check(self):
        pass

    def identity(self):
        return {"name": self.name}

    @contextmanager
    def open(self, rubric, stop):
        def compare(pair, corrections):
            if self.least is not None and len(self.calls) >= self.least:
                raise RuntimeError("the power went")
            self.calls.append(pair.prompt.text)
            first, second = float(pair.first.mean()), float(pair.second.mean())
            verdict = "tie" if abs(first - second) < 1e-3 else "A" if first > second else "B"
            return Reply(answer(verdict, "tie"))

        yield compare


@dataclass(frozen=True, kw_only=True)
class Images:
    """Stands in for the stages before: flat images of a brightness."""

    version: ClassVar[str] = "1"
    shown: Mapping[str, float]
    seed: int = 0

    def run(self, out, **inputs) -> dict[str, float]:
        for name, value in self.shown.items():
            images = torch.full((COUNT, 3, 8, 8), value)
            ImageWriter(out / "images.zarr", name, COUNT).write(0, images, 0.1)
        rows = [{"prompt": f"prompt {i}", "seed": self.seed + i, "psnr": 40} for i in range(COUNT)]
        (out / "report.json").write_text(json.dumps({"images": rows}))
        return {}


@dataclass(frozen=True, kw_only=True)
class Reference(Images):
    def run(self, out) -> dict[str, float]:
        return super().run(out)


@dataclass(frozen=True, kw_only=True)
class Validate(Images):
    def run(self, out) -> dict[str, float]:
        return super().run(out)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    Brighter.calls.clear()
    return Brighter.calls


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"prompt {i}", "seed": i} for i in range(COUNT)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptSet(path=str(file), start=0, count=COUNT)


@pytest.fixture(scope="session")
def configured():
    """The stage of conf/judge/openai.yaml, never asked anything by itself."""
    overrides = ["pipeline=judged", "judge=openai", "judge.backend.model=looker"]
    return instantiate(compose_config(overrides, "dirotq.conf").judge, _convert_="all")


@pytest.fixture
def judge(configured, prompts, store_root):
    def judge(**changes):
        settings = {"prompts": prompts, "repeats": 1, "backend": Brighter()}
        return dataclasses.replace(configured, store=str(store_root), **settings | changes)

    return judge


@pytest.fixture
def go(store_root):
    """Run a judge stage behind images as told; its artifact."""
    wiring = {
        "reference": {},
        "validate": {},
        "judge": {"reference": "reference", "validate": "validate"},
    }

    def go(stage, *, seed=0, **brightness):
        shown = BRIGHTNESS | brightness
        stages = {
            "reference": Reference(
                shown={k: shown[k] for k in ("original", "floor") if shown[k] is not None}
            ),
            "validate": Validate(shown={"packed": shown["packed"]}, seed=seed),
            "judge": stage,
        }
        steps = dag.plan({k: v for k, v in stages.items() if v is not None}, wiring)
        done = dag.run(steps, ArtifactStore(store_root), LocalExecutor())
        return {name: outcome.artifact for name, outcome in done.items()}

    return go


def report_of(artifacts) -> dict[str, Any]:
    return json.loads(artifacts["judge"].file("judge.json").read_text())


def test_the_worse_model_loses_and_the_control_ties(go, judge):
    done = go(judge())
    report = report_of(done)
    packed, control = report["comparisons"]["packed"], report["comparisons"]["control"]
    assert packed["perceptual_quality"]["outcomes"]["loss"] == COUNT
    assert packed["prompt_alignment"]["outcomes"]["tie"] == COUNT
    assert control["perceptual_quality"]["outcomes"]["tie"] == COUNT
    assert done["judge"].metrics["win_rate_perceptual_quality"] == 0
    assert done["judge"].metrics["control_win_rate_perceptual_quality"] == 0.5
    assert packed["labels"] == {"reference": "16 bit", "candidate": str(done["validate"])}
    assert (report["judge"], report["rubric"], report["prompts"]) == ("brighter", "1", COUNT)


def test_every_raw_answer_is_kept(go, judge):
    rows = [
        json.loads(line)
        for line in go(judge())["judge"].file("answers.jsonl").read_text().splitlines()
    ]
    assert len(rows) == COUNT * 2 * 2
    assert all(json.loads(row["texts"][0]) == row["answer"] for row in rows)


def test_the_page_shows_lost_pairs_and_fetches_nothing(go, judge):
    page = go(judge(pairs=3))["judge"].file("judge.html").read_text()
    assert len(re.findall(r'<img src="data:image/png', page)) == 2 * 3
    assert "prompt 2" in page and "prompt 3" not in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "null control" in page


def test_nothing_lost(go, judge):
    page = go(judge(), packed=0.6)["judge"].file("judge.html").read_text()
    assert "<img" not in page


def test_without_control(go, judge, calls):
    done = go(judge(control=False), floor=None)
    assert report_of(done)["comparisons"].keys() == {"packed"}
    assert len(calls) == COUNT * 2


def test_a_control_without_a_second_set(go, judge):
    with pytest.raises(ConfigError, match=r"reference\.floor=true, or judge\.control=false"):
        go(judge(), floor=None)


def test_fewer_prompts(go, judge, calls):
    assert report_of(go(judge(count=2)))["prompts"] == 2
    assert set(calls) == {"prompt 0", "prompt 1"}


def test_two_packed_models(go, judge):
    rival = go(None, packed=0.2)["validate"]
    stage = judge(against=str(rival), control=False)
    stage.check()
    packed = report_of(go(stage))["comparisons"]["packed"]
    assert packed["perceptual_quality"]["outcomes"]["win"] == COUNT
    assert packed["labels"]["reference"] == str(rival)


def test_a_rival_with_other_seeds_is_refused_before_anything_runs(go, judge, calls):
    rival = go(None, packed=0.2, seed=9)["validate"]
    with pytest.raises(ConfigError, match=r"other prompts or seeds: its image 0 is of .*, 9\)"):
        judge(against=str(rival)).check()
    with pytest.raises(ConfigError, match="other prompts or seeds"):
        go(judge(), seed=9)
    assert calls == []


def test_a_rival_that_is_not_there(judge):
    with pytest.raises(ConfigError, match="is not in the store"):
        judge(against="validate/0123456789abcdef").check()


def test_killed_half_way_it_goes_on(go, judge, calls):
    whole = report_of(go(judge(), packed=0.45))  # the same verdicts
    calls.clear()
    with pytest.raises(RuntimeError, match="the power went"):
        go(judge(backend=Brighter(least=5)))
    assert len(calls) == 5
    done = go(judge())
    assert len(calls) == COUNT * 2 * 2
    assert report_of(done)["metrics"] == whole["metrics"]
    go(judge())
    assert len(calls) == COUNT * 2 * 2  # cached


def test_damaged_answers_alone_are_asked_again_and_strangers_go(go, judge, calls, store_root):
    with pytest.raises(RuntimeError, match="power"):
        go(judge(backend=Brighter(least=5)))
    [partial] = (store_root / "judge").glob("*.partial")
    file = partial / "data" / "answers.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 5
    lines[1] = lines[1].replace(b"prompt ", b"prompT ", 1)
    lines[4] = lines[4][: len(lines[4]) // 2]
    file.write_bytes(b"".join(lines))
    (partial / "data" / "judge.html.partial").write_text("half")
    done = go(judge())["judge"]
    assert len(calls) == COUNT * 2 * 2 + 2
    assert sorted(done.manifest["files"]) == ["answers.jsonl", "judge.html", "judge.json"]


def test_what_counts_for_its_identity(configured):
    def with_backend(**changes):
        backend = dataclasses.replace(configured.backend, **changes)
        return recipe(dataclasses.replace(configured, backend=backend))

    same = {
        "base_url": "https://elsewhere/v1", "concurrency": 2, "requests_per_minute": 3.0,
        "timeout": 9, "attempts": 2, "api_key_env": "A_KEY",
    }  # fmt: skip
    other = {
        "model": "m", "temperature": 0.1, "max_tokens": 5, "structured": False,
        "extra": {"top_p": 0.1},
    }  # fmt: skip
    assert same.keys() | other.keys() == {f.name for f in dataclasses.fields(configured.backend)}
    assert with_backend(**same) == recipe(configured)
    for name, value in other.items():
        assert with_backend(**{name: value}) != recipe(configured), name
    rubric = dataclasses.replace(configured.rubric, prompt_alignment="Which is nicer?")
    for changes in ({"repeats": 3}, {"rubric": rubric}, {"attempts": 9}, {"count": 2}):
        assert recipe(dataclasses.replace(configured, **changes)) != recipe(configured), changes


def test_through_a_server_and_the_key_in_no_file(go, judge, configured, monkeypatch, store_root):
    key = "sk-nobody-may-see-this"
    monkeypatch.setenv("JUDGE_KEY", key)
    with serving(lambda number, body: completion(answer("A"))) as server:
        backend = dataclasses.replace(
            configured.backend, base_url=server.url, api_key_env="JUDGE_KEY"
        )
        stage = judge(backend=backend)
        stage.check()
        done = go(stage)
    assert len(server.bodies) == COUNT * 2 * 2
    assert all(h["authorization"] == f"Bearer {key}" for h in server.headers)
    assert report_of(done)["comparisons"]["packed"]["perceptual_quality"]["first_slot"]["mean"] == 1
    for path in store_root.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path


def test_behind_the_real_line(line, finished):
    """What reference and validate really leave, through the configuration tree."""
    with serving(lambda number, body: completion(answer("tie", "B"))) as server:
        judged = line(
            "pipeline=judged",
            "judge=openai",
            "judge.backend.model=looker",
            f"judge.backend.base_url={server.url}",
        )
        done = tiny_line.run(judged)
    assert done["validate"].fingerprint == finished["validate"].fingerprint
    assert len(server.bodies) == 2 * 2 * 2 * 2  # prompts, orders, repeats, comparisons
    packed = report_of(done)["comparisons"]["packed"]
    assert packed["perceptual_quality"]["outcomes"]["tie"] == 4
    assert packed["prompt_alignment"]["first_slot"]["mean"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repeats": 0}, "judge.repeats=0: use at least 1"),
        ({"attempts": 0}, "judge.attempts=0: use at least 1"),
        ({"count": 0}, "judge.count=0: use at least 1"),
        ({"pairs": -1}, "judge.pairs=-1: use at least 0"),
        ({"failures": 2}, "judge.failures=2: it is a share"),
        ({"against": "validate/abc"}, "names no validated model"),
        ({"against": "pack/0123456789abcdef"}, "names no validated model"),
    ],
)
def test_settings_out_of_range(judge, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        judge(**changes)


def test_more_prompts_than_there_are(judge):
    with pytest.raises(ConfigError, match=r"judge\.count=9, and there are 4 held-out prompts"):
        judge(count=9).check()
