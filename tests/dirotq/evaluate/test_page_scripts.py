"""The scripts of both pages, run by Node on a document that has just what they ask for."""

import json
import shutil
import subprocess

import pytest

from dirotq.evaluate.web import script

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no node")

PAIR = """
const element = (more) => ({
  handlers: {}, style: {setProperty(name, value) { this[name] = value; }}, ...more,
  addEventListener(name, call) { this.handlers[name] = call; },
  setAttribute(name, value) { this[name] = value; },
  classList: {toggle(name, on) { stage.shown = on; }},
  getBoundingClientRect: () => ({left: 10, width: 200}),
});
const stage = element({}), slider = element({value: "50"}), differs = element({checked: false});
const parts = {".stage": stage, "input[type=range]": slider, "input[type=checkbox]": differs};
const pairs = [{querySelector: (name) => parts[name]}];
globalThis.document = {querySelectorAll: (name) => name === "figure.pair" ? pairs : []};
const told = [], tell = () => told.push([stage.style["--at"], slider["aria-valuetext"]]);
"""
ANY_TWO = """
const choice = (value) => ({value, addEventListener(name, call) { this.call = call; }});
const parts = {first: choice("0"), second: choice("1")};
parts.answer = {dataset: {pairs: PAIRS, counts: "[12,12,12]"}};
globalThis.document = {getElementById: (id) => parts[id]};
"""


def run(before: str, name: str, after: str) -> list:
    assert NODE is not None
    source = f"{before}\n{script(name)['text']}\n{after}"
    done = subprocess.run([NODE, "-e", source], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_pair_s_slider_pointer_and_difference():
    acts = """
    tell(); slider.value = "7"; slider.handlers.input(); tell();
    stage.handlers.pointerdown({clientX: 60}); tell();
    stage.handlers.pointermove({clientX: 110, buttons: 0}); tell();
    stage.handlers.pointermove({clientX: 110, buttons: 1}); tell();
    differs.checked = true; differs.handlers.change();
    console.log(JSON.stringify([told, stage.shown]));
    """
    told, shown = run(PAIR, "pairs.js.j2", acts)
    assert [at for at, _ in told] == ["50%", "7%", "25%", "25%", "50%"]
    assert told[1][1] == "7 % 16 bit, the rest packed"
    assert shown is True


def test_one_pair_is_shown_at_a_time():
    before = """
    const strip = [0, 1].map((i) => ({checked: i === 0, after(image) { this.image = image; },
      addEventListener(name, call) { this.call = call; }}));
    const away = [null, null];
    const silent = {style: {setProperty() {}}, setAttribute() {}, addEventListener() {}};
    globalThis.document = {
      createElement: () => ({}),
      querySelectorAll: (name) => name === "figure.pair"
        ? [0, 1].map((i) => ({
          classList: {toggle(name, on) { away[i] = on; }},
          querySelector: (part) => part === ".over" ? {src: "data:" + i} : silent,
        })) : strip,
    };
    """
    acts = """
    const first = [...away]; strip[0].checked = false; strip[1].checked = true; strip[1].call();
    console.log(JSON.stringify([first, away, strip.map((choice) => choice.image)]));
    """
    first, second, images = run(before, "pairs.js.j2", acts)
    assert (first, second) == ([False, True], [True, False])
    assert images == [{"src": f"data:{i}", "alt": f"pair {i + 1}"} for i in (0, 1)]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (0, 1, "Run 1 is closer to the 16-bit images: 1 minus 2 is 1.50 dB [1.00, 2.00]. "
               "Paired: for 11 of 12 prompts run 1 is the closer one."),
        (1, 0, "Run 1 is closer to the 16-bit images: 2 minus 1 is -1.50 dB [-2.00, -1.00]. "
               "Paired: for 11 of 12 prompts run 1 is the closer one."),
        (0, 2, "No difference could be shown: 1 minus 3 is 0.50 dB [-0.10, 1.10]. "
               "Unpaired: their prompts differ, so this test sees large differences only."),
        (1, 1, "Choose two runs."),
    ],
)  # fmt: skip
def test_any_two_runs_in_either_order(first, second, said):
    pairs = json.dumps([[0, 1, 1.5, 1.0, 2.0, 11], [0, 2, 0.5, -0.1, 1.1, None]])
    acts = f"""
    parts.first.value = "{first}"; parts.second.value = "{second}"; parts.first.call();
    console.log(JSON.stringify(answer.textContent));
    """
    told = run(ANY_TWO.replace("PAIRS", json.dumps(pairs)), "comparing/compare.js.j2", acts)
    assert str(told).replace("\u2212", "-") == said  # a minus sign, as typeset
