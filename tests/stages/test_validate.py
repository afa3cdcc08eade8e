import dataclasses
import json
import math
import shutil
from dataclasses import dataclass

import pytest
import torch
import zarr
from tiny_line import publish, run_stage, stage
from tiny_offload import absent
from torch.nn.functional import linear
from web_page import Page, refuse_faults

import dirotq
from dirotq.errors import ArtifactError, ConfigError
from dirotq.evaluate import images as stored_images
from dirotq.evaluate.images import read_images
from dirotq.quantize.running import Way
from dirotq.quantize.tensors import read_array
from dirotq.sources.generation import generate, generate_with_sound
from dirotq.stages.validate import Validate

pytestmark = pytest.mark.usefixtures("looks_every_time")


@pytest.fixture(scope="session")
def validate(line) -> Validate:
    return stage(line(), "validate")


@pytest.fixture(scope="session")
def inputs(finished):
    return {name: finished[name] for name in ("capture", "basis", "rank", "pack", "reference")}


@pytest.fixture(scope="session")
def report(finished) -> dict:
    return json.loads(finished["validate"].file("report.json").read_text())


@dataclass(frozen=True, kw_only=True)
class MeanReader:
    """Reads an image's mean, so that the two pipelines get different marks."""

    def features(self, images):
        return torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1)

    def counts(self, images, prompts):
        assert len(images) == len(prompts)
        mean = images.double().mean((1, 2, 3))
        return {"brightness": torch.stack([mean, torch.ones_like(mean)], 1)}

    def totals(self, counts):
        return {
            "count": float(len(counts["brightness"])),
            "mean": counts["brightness"][:, 0].mean().item(),
        }


@dataclass(frozen=True, kw_only=True)
class Brightness:
    """A learned metric of one image, without anything learned."""

    paired: bool
    whole: bool = False

    def check(self):
        pass

    def open(self, device):
        return _Meter(self)


class _Meter:
    def __init__(self, metric):
        self.metric, self.values = metric, []

    def update(self, images, prompts, original):
        assert len(images) == len(prompts) == len(original)
        base = original if self.metric.paired else torch.zeros_like(images)
        self.values += (images - base).mean((1, 2, 3)).tolist()

    def compute(self):
        values, self.values = self.values, []
        return sum(values) / len(values) if self.metric.whole else values


def test_report_has_every_number(report, finished):
    assert report.keys() == {
        "running",
        "text_encoders",
        "model",
        "method",
        "date",
        "command",
        "settings",
        "fingerprints",
        "versions",
        "verdict",
        "resumed",
        "timesteps",
        "images",
        "scores",
        "attributes",
        "sites",
        "bytes",
        "bits_per_parameter",
        "parameters",
        "seconds_per_image",
        "device",
        "devices",
        "dtype",
        "size",
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
    for name in ("psnr", "ssim", "ms_ssim"):
        for metric, rows in (
            (name, report["images"]),
            (f"{name}_floor", [image["floor"] for image in report["images"]]),
        ):
            values = [image[name] for image in rows]
            assert report["metrics"][metric] == pytest.approx(sum(values) / len(values))
            line = report["scores"][name]["packed" if metric == name else "floor"]
            assert line["low"] <= report["metrics"][metric] == line["mean"] <= line["high"]
            assert (line["low"], line["high"]) == pytest.approx((min(values), max(values)))
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
    assert {s["format"] for s in sites} == {"W4A4 LM4", "W4A16 LM4"}
    assert all(10 < s["sqnr_db"] < 80 for s in sites)
    assert {s["rank"] for s in sites if s["kind"] == "block"} == {16}


def test_noise_is_relative_to_the_original_output(report, validate, inputs):
    """10 lg of |Y|² / |Y' - Y|², Y the 16-bit layer's output on the sampled rows."""
    packed = dirotq.load(inputs["pack"].path, device="cpu").transformer
    rows = zarr.open_group(inputs["capture"].tree("rows.zarr"), mode="r")
    weights = validate.model.weights()
    for site, found in zip(validate.model.sites(), report["sites"], strict=True):
        x = read_array(rows, site.name).float()
        want = linear(x, *weights.stacked(site)).double()
        noise = packed.get_submodule(site.name)(x).double() - want
        want_db = float(10 * torch.log10(want.square().sum() / noise.square().sum()))
        assert found["sqnr_db"] == pytest.approx(want_db, abs=1e-4)


def test_report_says_what_it_is_about(report, validate, finished):
    assert (report["model"], report["method"]) == ("model", "dirotq")
    assert report["command"] == "dirotq compress"  # the fixture runs the stages without overrides
    assert report["settings"]["rank.r"] == 16
    assert report["settings"]["validate.batch"] == 2
    assert report["settings"]["model.call.height"] == 32
    made = {name: str(artifact) for name, artifact in finished.items() if name != "validate"}
    assert report["fingerprints"] == made
    assert report["resumed"] == 0
    assert report["verdict"]["level"] == "close"
    text = json.dumps(report)
    assert str(validate.model.path) not in text  # no path of this machine
    assert str(finished["pack"].path.parents[1]) not in text


def test_errors_by_timestep_add_up_to_those_of_the_sites(report):
    assert report["timesteps"] == sorted(report["timesteps"], reverse=True)
    assert len(report["timesteps"]) == 3
    for site in report["sites"]:
        low, high = min(site["by_timestep"]), max(site["by_timestep"])
        assert low - 1e-9 <= site["sqnr_db"] <= high + 1e-9


def test_report_html_is_one_file_that_fetches_nothing(validate, inputs, report, tmp_path):
    run_stage(validate, tmp_path, **inputs)
    page = Page((tmp_path / "report.html").read_text())
    refuse_faults(page)
    assert len(page.all("svg")) == 3
    assert [picture.size for picture in page.pictures()] == [(32, 32)] * 6
    assert f"{report['metrics']['psnr']:.1f} dB" in page.text
    for site in report["sites"]:
        assert site["site"] in page.text
    assert "no command is known" in page.text


def test_a_reader_sees_all_three_sets(validate, inputs, tmp_path):
    judged = dataclasses.replace(validate, reader=MeanReader(), pairs=0)
    metrics = run_stage(judged, tmp_path, **inputs)
    report = json.loads((tmp_path / "report.json").read_text())
    attributes, captioned = report["attributes"], report["scores"]["captioned"]
    assert set(attributes) == set(captioned) - {"difference"} == {"original", "floor", "packed"}
    assert {a["count"] for a in attributes.values()} == {2.0}
    assert attributes["original"]["mean"] != attributes["packed"]["mean"]
    for name in attributes:
        key = "attributes" if name == "packed" else f"attributes_{name}"
        assert metrics[key] == attributes[name]["mean"]
        assert captioned[name]["mean"] == pytest.approx(attributes[name]["mean"])
    apart = attributes["packed"]["mean"] - attributes["original"]["mean"]
    assert captioned["difference"]["mean"] == pytest.approx(apart)
    assert report["images"][1]["original"]["captioned"] != report["images"][1]["captioned"]
    for name in ("fid", "kid"):
        assert set(report["scores"][name]) == {"packed", "floor"}
        assert set(report["scores"][name]["packed"]) == {"mean"}
        assert metrics[name] == report["scores"][name]["packed"]["mean"]
    assert metrics["fid"] > metrics["fid_floor"] >= 0
    html = (tmp_path / "report.html").read_text()
    assert "Captioned attributes" in html
    assert "FID, attribute reader" in html
    assert "data:image" not in html


def test_learned_metrics_score_the_sets_that_they_can(validate, inputs, tmp_path):
    learned = {
        "light": Brightness(paired=False),
        "shift": Brightness(paired=True),
        "mood": Brightness(paired=False, whole=True),
    }
    run_stage(dataclasses.replace(validate, learned=learned, batch=1), tmp_path, **inputs)
    report = json.loads((tmp_path / "report.json").read_text())
    scores = report["scores"]
    assert set(scores["light"]) == {"packed", "floor", "original", "difference"}
    assert set(scores["shift"]) == {"packed", "floor"}
    assert set(scores["mood"]) == {"packed", "floor", "original"}
    assert scores["mood"]["packed"] == {"mean": pytest.approx(scores["light"]["packed"]["mean"])}
    assert scores["shift"]["packed"]["mean"] == pytest.approx(
        scores["light"]["difference"]["mean"], abs=1e-6
    )
    packed = read_images(tmp_path / "images.zarr", "packed").mean((1, 2, 3))
    assert [image["light"] for image in report["images"]] == pytest.approx(packed.tolist())
    assert "<td>light</td>" in (tmp_path / "report.html").read_text()


def test_a_learned_metric_that_cannot_be_is_refused_before_anything_runs(validate):
    class Absent:
        def check(self):
            raise ConfigError("no such weights")

    with pytest.raises(ConfigError, match="no such weights"):
        dataclasses.replace(validate, learned={"absent": Absent()}).check()


def test_without_a_floor(validate, inputs, line, tmp_path):
    bare = run_stage(stage(line("reference.floor=false"), "reference"), tmp_path / "reference")
    assert bare["images"] == 2
    reference = publish(tmp_path / "store", "reference", lambda data: shutil.copytree(
        tmp_path / "reference", data, dirs_exist_ok=True
    ))  # fmt: skip
    metrics = run_stage(validate, tmp_path / "out", **inputs | {"reference": reference})
    assert not [name for name in metrics if name.endswith("_floor")]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "noise floor was not measured" in " ".join(report["verdict"]["reasons"])
    assert "(noise floor)" not in (tmp_path / "out" / "report.html").read_text()


def test_images_stay_and_an_interrupted_run_goes_on(
    validate, inputs, tmp_path, monkeypatch, report
):
    single = dataclasses.replace(validate, batch=1)
    made = []

    def stop_after_one(pipe, prompts, call):
        if made:
            raise KeyboardInterrupt
        made.append(prompts[0].seed)
        return generate_with_sound(pipe, prompts, call)

    monkeypatch.setattr(stored_images, "generate_with_sound", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        run_stage(single, tmp_path, **inputs)
    monkeypatch.setattr(
        stored_images,
        "generate_with_sound",
        lambda *args: made.append(args[1][0].seed) or generate_with_sound(*args),
    )
    run_stage(single, tmp_path, **inputs)
    assert made == [106, 107]
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["resumed"] == 1
    assert "1 of 2 packed images" in (tmp_path / "report.html").read_text()
    alone = told["images"]
    for a, b in zip(alone, report["images"], strict=True):
        assert a["psnr"] == pytest.approx(
            b["psnr"], abs=1.5
        )  # batches change no more than rounding


def test_reference_images_of_another_precision_or_count_are_refused(validate, inputs, tmp_path):
    other = dataclasses.replace(validate, dtype="bfloat16")
    with pytest.raises(ArtifactError, match=r"made in float32 \(CPU\).*Run with dtype=float32"):
        run_stage(other, tmp_path, **inputs)
    fewer = dataclasses.replace(validate.prompts, count=1)
    with pytest.raises(ArtifactError, match="holds 2 images, 1 are to be compared"):
        run_stage(dataclasses.replace(validate, prompts=fewer), tmp_path, **inputs)


@pytest.mark.parametrize("changes", [{"batch": 0}, {"pairs": -1}])
def test_settings_out_of_range(validate, changes):
    with pytest.raises(ConfigError, match=r"validate\.batch=.*validate\.pairs=.*at least 1 and 0"):
        dataclasses.replace(validate, **changes)


def test_a_dtype_that_nobody_knows(validate):
    with pytest.raises(ConfigError, match=r"dtype=half is unknown; use auto, float32, bfloat16"):
        dataclasses.replace(validate, dtype="half")


@pytest.mark.parametrize("kind", ["model", "group"])
def test_weights_that_wait_change_no_number(
    validate, inputs, report, finished, tmp_path, monkeypatch, kind
):
    if kind == "group":
        absent(monkeypatch)
    monkeypatch.setattr("dirotq.stages.validate.choose_here", lambda *_: Way(kind))
    run_stage(validate, tmp_path, **inputs)
    trees = tmp_path / "images.zarr", finished["validate"].tree("images.zarr")
    got, want = (read_images(tree, "packed") for tree in trees)
    assert torch.equal(got, want)
    told = json.loads((tmp_path / "report.json").read_text())
    for name in ("sites", "timesteps", "bytes", "scores"):
        assert told[name] == report[name]
