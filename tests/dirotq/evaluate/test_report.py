import base64
import io
import re

import pytest
import torch
from PIL import Image

from dirotq.evaluate.report import DIFFERENCE_GAIN, write_pairs, write_report

PROMPT = "<script>alert('x')</script> & a star"


def site(name: str, kind: str, rank: int) -> dict:
    return {
        "site": name,
        "kind": kind,
        "dim": 8,
        "outputs": 24,
        "rank": rank,
        "format": "W4A4",
        "sqnr_db": 21.5,
        "why": "fixed: 4 of 8 directions hold 93.1% of the energy",
    }


@pytest.fixture
def report() -> dict:
    scores = {"mean": 0.875, "colour": 1.0}
    return {
        "images": [{"prompt": PROMPT, "seed": 1, "psnr": 31.4, "ssim": 0.91}] * 2,
        "attributes": {"original": scores, "packed": scores},
        "scores": {
            "psnr": {
                "packed": {"mean": 31.4, "low": 30.25, "high": 32.5},
                "floor": {"mean": 61.5, "low": 60.0, "high": 63.0},
            },
            "clip": {
                "packed": {"mean": 26.5, "low": 25.0, "high": 28.0},
                "original": {"mean": 26.75, "low": 25.0, "high": 28.0},
                "difference": {"mean": -0.25, "low": -0.5, "high": 0.00001},
            },
            "fid": {"packed": {"mean": 0.125}, "floor": {"mean": 0.0625}},
        },
        "sites": [site("block.qkv", "block", 4), site("block.norm", "modulator", 0)],
        "bytes": {"codes": 4000, "scales": 100, "basis": 0, "total": 4100, "original": 16000},
        "bits_per_parameter": 4.1,
        "seconds_per_image": {"original": 1.0, "packed": 2.0},
        "device": "CPU, reference path",
        "devices": {"packed": "CPU, reference path", "original": "some card"},
        "dtype": "float32",
        "size": [128, 128],
        "inputs": {"pack": "pack/0123456789abcdef"},
        "metrics": {
            "psnr": 31.4,
            "ssim": 0.91,
            "bits_per_parameter": 4.1,
            "compression": 3.9,
            "seconds_per_image": 2.0,
            "seconds_per_image_original": 1.0,
            "attributes": 0.875,
            "attributes_original": 0.875,
        },
    }


@pytest.fixture
def page(report, tmp_path):
    def write(**changes) -> str:
        spectra = {"block.qkv": torch.logspace(-4, 0, 8)}
        want = torch.full((2, 3, 12, 12), 0.5)
        write_report(tmp_path / "report.html", report | changes, spectra, want, want + 0.05)
        return (tmp_path / "report.html").read_text()

    return write


def images(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_pairs_and_their_magnified_difference(page):
    want, got, difference = images(page())[:3]
    assert want.size == (12, 12)
    assert want.getpixel((3, 3)) == (128, 128, 128)
    assert got.getpixel((3, 3)) == (140, 140, 140)
    assert difference.getpixel((3, 3)) == (round(0.05 * DIFFERENCE_GAIN * 255),) * 3


def test_scores_with_their_intervals_and_the_noise_floor(page):
    html = page()
    table = re.search(r"<h2>Scores</h2>\n<table>(.*?)</table>", html, re.DOTALL)[1]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    plain = [[re.sub("<[^>]+>", "", cell) for cell in row] for row in rows]
    assert plain == [
        ["PSNR, dB", "31.40 [30.25, 32.50]", "61.50 [60.00, 63.00]", "", ""],
        ["clip", "26.50 [25.00, 28.00]", "", "26.75 [25.00, 28.00]", "-0.2500 [-0.5000, 1.0e-05]"],
        ["FID, attribute reader", "0.1250", "0.0625", "", ""],
    ]
    assert "noise floor" in html
    assert "MS-SSIM on 4 scales" in html
    assert "10,000 resamples" in html
    assert "16 bit: some card" in html


def test_prompts_are_text_and_not_markup(page):
    html = page()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_numbers_tables_and_figures_are_there(page):
    html = page()
    for said in ("31.40 dB", "4.10", "3.90&times;", "87.5", "pack/0123456789abcdef", "block.norm"):
        assert said in html
    assert html.count("<svg") == 3
    assert "fixed: 4 of 8 directions" in html


def test_without_a_judge_nothing_is_said_about_attributes(page, report):
    metrics = {k: v for k, v in report["metrics"].items() if not k.startswith("attributes")}
    assert "attributes" not in page(attributes=None, metrics=metrics).lower()


def test_nothing_is_fetched(page):
    html = page()
    links = re.findall(r'(?:src|href|action)\s*=\s*["\']([^"\'#]*)', html)
    assert links
    assert all(link.startswith("data:") for link in links if link)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import|<link|<iframe|<script", html)


def test_no_image_pairs_and_no_spectra_still_make_a_page(report, tmp_path):
    sites = [s for s in report["sites"] if s["kind"] == "modulator"]
    empty = torch.zeros(0, 3, 12, 12)
    write_report(tmp_path / "r.html", report | {"sites": sites}, {}, empty, empty)
    assert not images((tmp_path / "r.html").read_text())


def test_pairs_are_two_rows_of_one_picture(tmp_path):
    want = torch.stack([torch.full((3, 4, 6), value) for value in (0.0, 0.2)])
    write_pairs(tmp_path / "pairs.png", want, want + 0.4)
    with Image.open(tmp_path / "pairs.png") as picture:
        assert picture.size == (12, 8)
        corners = [picture.getpixel(at)[0] for at in ((0, 0), (11, 0), (0, 7), (11, 7))]
    assert corners == [0, 51, 102, 153]
