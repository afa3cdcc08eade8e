import re

import numpy as np
import pytest
import torch
from PIL import Image
from shown_report import PROMPT, site, whole_report
from web_page import Page, refuse_faults

from dirotq.evaluate.pictures import Embedded, embed
from dirotq.evaluate.png import picture
from dirotq.evaluate.report import (
    DIFFERENCE_GAIN,
    IMAGE_BYTES,
    worst_first,
    write_pairs,
    write_report,
)


@pytest.fixture
def report() -> dict:
    return whole_report()


@pytest.fixture
def page(report, tmp_path):
    def write(side: int = 12, **changes) -> Page:
        spectra = {"block.qkv": torch.logspace(-4, 0, 8).flip(0)}
        want = torch.full((2, 3, side, side), 0.5)
        write_report(tmp_path / "report.html", report | changes, spectra, [1, 0], want, want + 0.05)
        return Page((tmp_path / "report.html").read_text())

    return write


def test_nothing_is_fetched_nothing_injected_and_every_image_described(page):
    refuse_faults(page())


def test_pairs_and_their_magnified_difference(page):
    want, got, difference = page().pictures()[:3]
    assert want.size == (12, 12)
    assert want.getpixel((3, 3)) == (128, 128, 128)
    assert got.getpixel((3, 3)) == (140, 140, 140)
    assert difference.getpixel((3, 3)) == (round(0.05 * DIFFERENCE_GAIN * 255),) * 3


def test_the_headline_says_verdict_distance_size_model_and_method(page):
    text = page().text
    assert "Good: <so>. 31.4 dB from the 16-bit images, 3.9 times smaller." in text
    assert "org/model + <b>style</b> x 0.8 , packed by dirotq , 2026-11-30" in text
    assert "One reason." in text


def test_the_command_settings_and_fingerprints_are_there(page):
    shown = page()
    assert "dirotq compress 'model=a & b' rank.r=16" in shown.text
    for said in ("rank.energy null", "method.act_bits 4", "pack pack/0123456789abcdef"):
        assert said in shown.text
    assert "torch 2.13.0." in shown.text
    assert "no command is known" in page(command=None).text


def test_memory_is_told_way_by_way(page):
    shown = page().text
    assert "nothing; decoded in tiles" in shown
    assert "components; decoded in tiles" not in shown


def test_prompts_and_names_are_text_and_not_markup(page):
    shown = page()
    assert len(shown.scripts) == 1
    assert "alert" not in shown.scripts[0]
    assert PROMPT in shown.text
    assert not shown.all("so")
    assert f"packed: {PROMPT}" in [image["alt"] for image in shown.all("img")]


def test_half_a_letter_is_shown_by_its_number(page, report):
    images = [image | {"prompt": "\ud83d"} for image in report["images"]]
    assert "\\ud83d" in page(images=images).text


def test_worst_prompts_come_first(page, report):
    assert worst_first(report["images"], 8) == [1, 0]
    assert worst_first(report["images"], 1) == [1]
    text = page().text
    assert text.index("30.0 dB") < text.index("31.4 dB , SSIM")
    assert "Images: all 2 prompts, worst first" in text
    assert "the 2 worst of 3 prompts, worst first" in page(images=3 * report["images"][:1]).text


@pytest.mark.parametrize(("side", "wide"), [(12, 384), (384, 384), (400, 400)])
def test_pairs_have_their_size_and_small_ones_a_multiple_of_it(page, side, wide):
    stage = next(a for a in page(side).all("div") if a.get("class", "").startswith("stage"))
    assert stage["style"] == f"max-width: {wide}px"
    assert ("tiny" in stage["class"]) == (wide > side)


def test_a_slider_that_the_keyboard_reaches(page):
    sliders = [a for a in page().all("input") if a["type"] == "range"]
    assert [(a["min"], a["max"], a["value"]) for a in sliders] == [("0", "100", "50")] * 2
    assert not [a for a in sliders if a.get("tabindex") == "-1"]
    assert all(a.get("tabindex") == "0" for a in page().all("div") if a.get("class") == "wide")


def test_the_tiles_answer_what_was_kept_how_small_how_fast_and_what_was_lost(page, report):
    text = page().text
    assert "Quality 31.4 dB PSNR to the 16-bit images. The 16-bit model to itself (noise" in text
    assert (
        "Size 4.1 kB transformer, 4.10 bits per parameter, all counted (16 bit: 16.0 kB)." in text
    )
    assert (
        "Most was lost in block.qkv output SQNR 21.5 dB; the least in block.norm, 21.5 dB." in text
    )
    same = {"psnr": {"packed": {"mean": 31.4}, "floor": {"mean": 104.1}}}
    assert "The 16-bit model run again: the same images." in page(scores=same).text


@pytest.mark.parametrize(
    ("packed", "original", "said"),
    [
        (("H200", 2.0), ("H200", 5.0), "3.9 times smaller, 2.5 times faster."),
        (("H200", 3.0), ("H200", 1.5), "3.9 times smaller, 2.0 times slower."),
        (("H200", 2.0), ("H100", 5.0), "3.9 times smaller."),
        (("CPU, reference path", 2.0), ("CPU, reference path", 5.0), "3.9 times smaller."),
    ],
)
def test_speed_is_compared_on_one_gpu_only(page, packed, original, said):
    names, seconds = ({"packed": packed[i], "original": original[i]} for i in (0, 1))
    assert said in page(devices=names, seconds_per_image=seconds).text


def test_times_of_the_reference_path_are_told_apart(page, report):
    assert "not measured 2.00 s per image on the CPU\u2019s reference path" in page().text
    metal = page(devices={"packed": "H200", "original": "H100"}).text
    assert "2.00 s per image, H200 (16 bit, H100: 1.00 s)" in metal
    assert "reference path" not in metal


@pytest.mark.parametrize(("resumed", "told"), [(0, False), (1, True)])
def test_a_run_that_was_interrupted_says_so(page, resumed, told):
    said = f"was interrupted and went on: {resumed} of 2 packed images"
    assert (said in page(resumed=resumed).text) is told


def test_scores_with_their_intervals_and_the_noise_floor(page):
    shown = page()
    table = re.search(
        r"<h2 id=.scores.>Scores</h2>\n<div[^>]*><table>(.*?)</table>", shown.html, re.DOTALL
    )[1]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    plain = [[re.sub("<[^>]+>", "", cell) for cell in row] for row in rows]
    assert plain == [
        ["PSNR, dB", "31.40 [30.25, 32.50]", "61.50 [60.00, 63.00]", "", ""],
        ["clip", "26.50 [25.00, 28.00]", "", "26.75 [25.00, 28.00]", "-0.2500 [-0.5000, 1.0e-05]"],
        ["FID, attribute reader", "0.1250", "0.0625", "", ""],
    ]
    assert "noise floor" in shown.text
    assert "MS-SSIM on 4 scales" in shown.text
    assert "10,000 resamples" in shown.text
    assert "some card" in shown.text


def test_losses_have_the_names_of_their_sites(page):
    shown = page()
    assert len(shown.all("svg")) == 3
    assert "block.qkv: 21.5 dB, W4A4, rank 4" in shown.text
    assert "dB at timestep kind (* is the block), worst first sites" in shown.text
    assert "worst, dB in block 0.9 0.5 0.1" in shown.text
    assert re.search(r"block\.qkv 1 21\.5 21\.5 20\.0 23\.0", shown.text)
    assert "fixed: 4 of 8 directions" in shown.text
    none = [site | {"by_timestep": []} for site in shown_sites()]
    assert "recorded no timesteps" in page(timesteps=[], sites=none).text


def shown_sites() -> list[dict]:
    return [site("block.qkv", "block", 4), site("block.norm", "modulator", 0)]


def test_bytes_stand_against_the_original(page):
    text = page().text
    assert "4-bit codes 4.0 kB 25.0 %" in text
    assert "packed 4.1 kB 25.6 %" in text
    assert "bases" not in text.partition("Bytes")[2]  # of which there are none


def test_without_a_judge_nothing_is_said_about_attributes(page, report):
    metrics = {k: v for k, v in report["metrics"].items() if not k.startswith("attributes")}
    text = page(attributes=None, metrics=metrics).text.lower()
    assert "captioned attributes" not in text.replace("captioned attributes, share per image", "")


def test_no_image_pairs_and_no_spectra_still_make_a_page(report, tmp_path):
    sites = [s for s in report["sites"] if s["kind"] == "modulator"]
    empty = torch.zeros(0, 3, 12, 12)
    write_report(tmp_path / "r.html", report | {"sites": sites}, {}, [], empty, empty)
    shown = Page((tmp_path / "r.html").read_text())
    assert not shown.pictures()
    assert not shown.scripts
    assert len(shown.all("svg")) == 2


def test_a_pair_of_1024_pixels_takes_its_eighth_at_a_good_quality():
    """Noise of all scales, which is harder to compress than photographs."""
    rng = np.random.default_rng(0)
    octaves = [
        np.kron(rng.random((3, 1 << k, 1 << k)), np.ones((1, 1024 >> k, 1024 >> k))) / (k + 1)
        for k in (2, 5, 8, 10)
    ]
    want = torch.tensor(sum(octaves) / 1.3).float().clamp(0, 1)
    got = (want + 0.02 * torch.randn(3, 1024, 1024)).clamp(0, 1)
    found = embed([picture(want), picture(got)], IMAGE_BYTES * 3 // 4 // 8)
    assert sum(map(len, found.urls)) <= IMAGE_BYTES * 3 // 4 // 8
    quality = re.fullmatch(r"WebP, quality (\d+)", found.stored)
    assert quality
    assert int(quality[1]) >= 40


def test_a_page_of_the_largest_model_stays_below_5_mb(report, tmp_path, monkeypatch):
    """Eight pairs that take all they may, 600 sites with their spectra, 5,000 prompts."""

    def full(pictures, budget):
        return Embedded(
            ("data:image/webp;base64," + "A" * (budget // len(pictures) - 23),) * len(pictures),
            "WebP",
        )

    monkeypatch.setattr("dirotq.evaluate.report.embed", full)
    names = [
        f"single_transformer_blocks.{i // 6}.a_long_name_of_a_linear.{i % 6}" for i in range(600)
    ]
    sites = [site(name, "block", 4) | {"by_timestep": [20.0] * 10} for name in names]
    rows = [image | {"prompt": "word " * 40} for image in report["images"][:1]] * 5000
    changed = report | {"sites": sites, "images": rows, "timesteps": [0.1 * i for i in range(10)]}
    pairs, path = torch.zeros(8, 3, 8, 8), tmp_path / "r.html"
    write_report(path, changed, dict.fromkeys(names, torch.rand(3072)), range(8), pairs, pairs)
    assert 4_200_000 < path.stat().st_size <= 5_000_000


def test_pairs_are_two_rows_of_one_picture(tmp_path):
    want = torch.stack([torch.full((3, 4, 6), value) for value in (0.0, 0.2)])
    write_pairs(tmp_path / "pairs.png", want, want + 0.4)
    with Image.open(tmp_path / "pairs.png") as picture:
        assert picture.size == (12, 8)
        corners = [picture.getpixel(at)[0] for at in ((0, 0), (11, 0), (0, 7), (11, 7))]
    assert corners == [0, 51, 102, 153]
