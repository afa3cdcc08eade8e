import re
import xml.etree.ElementTree as ElementTree

import pytest

from dirotq.evaluate.charts import HEIGHT, WIDTH, Axis, Dot, Series, chart


def drawn(**more) -> ElementTree.Element:
    return ElementTree.fromstring(chart("a <title>", Axis("x & y"), Axis("y"), **more))


def places(svg: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]


def test_names_are_text_and_not_markup():
    svg = drawn(dots=[Dot("<script>", 0, 1, label="<b>")], lines=[Series("a & b", [(0, 0)])])
    assert svg.get("aria-label") == "a <title>"
    assert sorted(t.text for t in svg.iter("title")) == ["<script>", "a & b"]
    assert {"<b>", "x & y"} <= {t.text for t in svg.iter("text")}


def test_places_follow_values_inside_of_the_frame():
    (left, low), (right, high) = places(drawn(dots=[Dot("", 1, 10), Dot("", 3, 20)]))
    assert 0 < left < right < WIDTH
    assert HEIGHT > low > high > 0  # SVG counts downwards


def test_powers_of_ten_are_equally_far_apart():
    dots = [Dot("", 10.0**e, 1) for e in range(3)]
    svg = ElementTree.fromstring(chart("t", Axis("x", log=True), Axis("y"), dots=dots))
    first, second, third = (x for x, _ in places(svg))
    assert second - first == pytest.approx(third - second, abs=0.11)
    assert {"1", "10", "100"} <= {t.text for t in svg.iter("text")}


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 10, ["0", "2", "4", "6", "8", "10"]), (43.1, 43.4, ["43.1", "43.2", "43.3", "43.4"])],
)
def test_ticks_are_round(low, high, ticks):
    svg = drawn(dots=[Dot("", 0, low), Dot("", 1, high)])
    found = [t.text for t in svg.iter("text") if t.get("text-anchor") == "end"]
    assert [t for t in found if t in ticks] == ticks
    assert len(found) < 10


def test_one_point_and_none():
    assert len(places(drawn(dots=[Dot("alone", 5, 5, bar=(4, 6))]))) == 1
    assert chart("t", Axis("x"), Axis("y")) == ""


def test_named_ticks_take_the_place_of_numbers():
    svg = ElementTree.fromstring(
        chart("t", Axis("x", ticks=[(0, "start"), (1, "end")]), Axis("y"),
              lines=[Series("l", [(0, 1), (1, 2)])])
    )  # fmt: skip
    texts = [t.text for t in svg.iter("text") if t.get("text-anchor") == "middle"]
    assert texts[:2] == ["start", "end"]
    assert re.fullmatch(r"[\d.]+,[\d.]+ [\d.]+,[\d.]+", next(svg.iter("polyline")).get("points"))


def test_few_powers_of_ten_have_ticks_between_them():
    svg = ElementTree.fromstring(
        chart("t", Axis("x"), Axis("y", log=True), lines=[Series("l", [(0, 0.04), (1, 1.0)])])
    )
    found = [t.text for t in svg.iter("text") if t.get("text-anchor") == "end"]
    assert [t for t in found if t in {"0.02", "0.05", "0.1", "0.2", "0.5", "1", "2"}] == [
        "0.05", "0.1", "0.2", "0.5", "1",
    ]  # fmt: skip


@pytest.mark.parametrize(("x", "anchor"), [(0, "start"), (1, "end")])
def test_a_name_stands_below_its_point_and_inside_of_the_chart(x, anchor):
    dots = [Dot("", 0, 5), Dot("", 1, 5), Dot("", x, 1, label="a.long.name", wordy=True)]
    svg = drawn(dots=dots)
    [name] = [t for t in svg.iter("text") if t.get("class") == "name"]
    at, height = places(svg)[-1]
    assert (name.text, name.get("text-anchor")) == ("a.long.name", anchor)
    assert float(name.get("x")) == pytest.approx(at)
    assert height < float(name.get("y")) < HEIGHT
