import re

import torch
from shown_report import site

from dirotq.evaluate.losses import LEAST, depth_chart, kinds, spectrum_chart, timestep_chart


def sites() -> list[dict]:
    made = [site(f"block.{i}.{part}", "block", 4) for i in range(2) for part in ("qkv", "out")]
    made[3] = made[3] | {"sqnr_db": 11.5, "by_timestep": [10.0, None, 13.0]}
    return [*made, site("block.0.norm", "modulator", 0)]


def names(svg: str) -> list[str]:
    return re.findall(r'<text class="name"[^>]*>([^<]*)<', svg)


def test_kinds_leave_out_the_block_and_name_it_of_the_worst_site():
    worst, *others = kinds(sites())
    assert (worst["name"], worst["count"], worst["block"]) == ("block.*.out", 2, "1")
    assert worst["mean"] == 16.5
    assert worst["by_timestep"] == [15.0, None, 18.0]
    assert [row["name"] for row in others] == ["block.*.qkv", "block.*.norm"]
    assert [row["block"] for row in kinds([site("proj_out", "block", 4)])] == [""]


def test_the_worst_is_named_in_the_charts():
    assert names(depth_chart(sites())) == ["block.1.out"]
    drawn = timestep_chart([0.9, 0.5, 0.1], kinds(sites()))
    assert names(drawn) == ["block.*.out"]
    assert drawn.count("strong") == 1
    assert len(re.findall(r'class="line b"', drawn)) == 1  # the modulators
    assert depth_chart([]) == ""


def test_spectra_are_one_line_per_kind_with_the_middle_rank():
    spectra = {f"block.{i}.qkv": torch.tensor([0.5, share, 0.0]) for i, share in
               enumerate((0.2, 0.3, 0.1))}  # fmt: skip
    svg = spectrum_chart(spectra, {"block.0.qkv": 1, "block.1.qkv": 2, "block.2.qkv": 2})
    assert svg.count('class="line') == 1
    assert "block.*.qkv: rank 1 to 2; 20.00% of the energy outside of 2 directions" in svg
    [points] = set(re.findall(r'points="([^"]*)"', svg))
    assert len(points.split()) == 2  # the third is below what is drawn
    assert f"{LEAST:.2%}" not in svg
