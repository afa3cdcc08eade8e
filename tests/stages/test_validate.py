import dataclasses
import json
import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from tiny_line import run_stage, stage

import dirotq
from dirotq.errors import ConfigError
from dirotq.models.source import generate
from dirotq.prompts import Prompt
from dirotq.stages import validate as module
from dirotq.stages.validate import Validate, _compare


@pytest.fixture(scope="session")
def validate(line) -> Validate:
    return stage(line(), "validate")


@pytest.fixture(scope="session")
def inputs(finished):
    return {name: finished[name] for name in ("capture", "basis", "rank", "pack")}


@pytest.fixture(scope="session")
def report(finished) -> dict:
    return json.loads(finished["validate"].file("report.json").read_text())


@dataclass(frozen=True, kw_only=True)
class MeanJudge:
    """Judges an image by its mean, so that the two pipelines get different marks."""

    def accuracy(self, images, prompts):
        assert len(images) == len(prompts)
        return {"mean": float(images.double().mean()), "count": float(len(prompts))}


def test_report_has_every_number(report, finished):
    assert report.keys() == {
        "images",
        "attributes",
        "sites",
        "bytes",
        "bits_per_parameter",
        "parameters",
        "seconds_per_image",
        "device",
        "inputs",
        "metrics",
    }
    assert [image["seed"] for image in report["images"]] == [106, 107]
    assert report["attributes"] is None
    assert report["inputs"]["pack"] == str(finished["pack"])
    assert report["device"] == "CPU, reference path"


def test_metrics_are_finite_and_sane(finished):
    metrics = finished["validate"].metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert 30 < metrics["psnr"] < 90
    assert 0.95 < metrics["ssim"] <= 1
    assert 20 < metrics["sqnr_db"] < 60
    assert metrics["seconds_per_image"] > 0
    assert metrics["compression"] > 1


def test_headline_is_the_mean_of_the_images(report):
    for name in ("psnr", "ssim"):
        values = [image[name] for image in report["images"]]
        assert report["metrics"][name] == pytest.approx(sum(values) / len(values))
    block = [s["sqnr_db"] for s in report["sites"] if s["kind"] == "block"]
    assert report["metrics"]["sqnr_db"] == pytest.approx(sum(block) / len(block))


def test_bytes_add_up(report, finished):
    parts = {k: v for k, v in report["bytes"].items() if k not in ("total", "original")}
    assert sum(parts.values()) == report["bytes"]["total"]
    assert report["bytes"]["original"] == 2 * report["parameters"]
    packed = finished["pack"].metrics
    assert report["bits_per_parameter"] == pytest.approx(packed["bits_per_parameter"])
    assert report["bytes"]["total"] / 1e6 == pytest.approx(packed["transformer_megabytes"])


def test_images_are_those_of_the_two_pipelines(validate, inputs, report):
    prompts, call = validate.prompts.load(), validate.model.call_arguments()
    cpu = torch.device("cpu")
    want = generate(validate.model.pipeline(torch.float32, cpu), prompts, call)
    got = generate(dirotq.load(inputs["pack"].path, device="cpu"), prompts, call)
    for image, w, g in zip(report["images"], want, got, strict=True):
        psnr = -10 * torch.log10((w - g).square().mean())
        assert image["psnr"] == pytest.approx(float(psnr), abs=0.05)


def test_every_site_has_its_line(report, validate):
    sites = report["sites"]
    assert [s["site"] for s in sites] == [s.name for s in validate.model.sites()]
    assert {s["format"] for s in sites} == {"W4A4", "W4A16"}
    assert all(10 < s["sqnr_db"] < 80 for s in sites)
    assert {s["rank"] for s in sites if s["kind"] == "block"} == {16}


def test_report_html_is_one_file_that_fetches_nothing(finished, report):
    html = finished["validate"].file("report.html").read_text()
    links = re.findall(r'(?:src|href)\s*=\s*["\']([^"\']*)', html)
    assert len([link for link in links if link.startswith("data:image/png;base64,")]) == 6
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import|<link|<iframe", html)
    assert "<script" not in html
    assert f"{report['metrics']['psnr']:.2f} dB" in html
    for site in report["sites"]:
        assert site["site"] in html


def test_a_judge_sees_both_sets_of_images(validate, inputs, tmp_path):
    judged = dataclasses.replace(validate, reader=MeanJudge(), pairs=0)
    metrics = run_stage(judged, tmp_path, **inputs)
    scores = json.loads((tmp_path / "report.json").read_text())["attributes"]
    assert scores["original"]["count"] == scores["packed"]["count"] == 2
    assert scores["original"]["mean"] != scores["packed"]["mean"]
    assert metrics["attributes"] == scores["packed"]["mean"]
    assert metrics["attributes_original"] == scores["original"]["mean"]
    html = (tmp_path / "report.html").read_text()
    assert "Captioned attributes" in html
    assert "data:image" not in html


def test_batches_change_no_image_beyond_rounding(validate, inputs, tmp_path, report):
    single = dataclasses.replace(validate, batch=1)
    run_stage(single, tmp_path, **inputs)
    alone = json.loads((tmp_path / "report.json").read_text())["images"]
    for a, b in zip(alone, report["images"], strict=True):
        assert a["psnr"] == pytest.approx(b["psnr"], abs=1.5)


def test_psnr_and_ssim_by_hand():
    want = torch.full((2, 3, 16, 16), 0.5)
    got = want.clone()
    got[1] += 0.1
    prompts = [Prompt("a", 1), Prompt("b", 2)]
    first, second = _compare(prompts, want, got)
    assert first["ssim"] == pytest.approx(1.0)
    assert second["psnr"] == pytest.approx(20.0, abs=1e-3)
    assert (second["prompt"], second["seed"]) == ("b", 2)


def test_the_first_batch_warms_up_and_is_not_timed(validate, monkeypatch):
    clock = iter([0.0, 100.0, 100.0, 104.0, 104.0, 110.0])
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(module, "generate", lambda pipe, batch, call: torch.zeros(len(batch), 3, 4))
    images, seconds = validate._images(None, [Prompt("a", 1)] * 6, "images")
    assert len(images) == 6
    assert seconds == 2.5  # (4 + 6) s over four images


@pytest.mark.parametrize("changes", [{"batch": 0}, {"pairs": -1}])
def test_settings_out_of_range(validate, changes):
    with pytest.raises(ConfigError, match=r"validate\.batch=.*validate\.pairs=.*at least 1 and 0"):
        dataclasses.replace(validate, **changes)
