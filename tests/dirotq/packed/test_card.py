"""Cards: what a packed pipeline says of itself, and whose card is kept."""

import dataclasses

import pytest
from huggingface_hub import ModelCard
from tiny_line import CALL, stage

from dirotq.packed.card import FIGURES, figures, is_ours, renewed
from dirotq.packed.made_from import base_of

REPORT = {
    "scores": {
        "psnr": {"packed": {"mean": 30.123456, "low": 29.0, "high": 31.0}},
        "fid": {"packed": {"mean": 1.5}, "floor": {"mean": 0.25}},
    },
    "size": [32, 64],
    "images": [{}] * 3,
    "dtype": "float32",
    "device": "CPU",
}


@pytest.fixture(scope="session")
def card(finished) -> str:
    return finished["pack"].file("model/README.md").read_text()


@pytest.fixture
def model(line, own_folder):
    return dataclasses.replace(stage(line(), "pack").model, path=str(own_folder))


def test_it_says_first_what_has_to_be_imported(card):
    assert is_ours(card)
    assert card.index("import dirotq") < card.index("from_pretrained(")
    assert '"Unknown\nquantization type, got dirotq"' in card
    assert str(CALL) in card
    for package in ("dirotq", "torch", "diffusers", "transformers"):
        assert f"`{package}" in card


def test_it_lists_what_is_packed_and_what_stays(card):
    assert "20 linears in 13 sites" in card
    assert "8\nlinears stay in 16 bits (`context_embedder`," in card
    row = next(line for line in card.splitlines() if "`to_q`" in line and "proj_mlp" not in line)
    assert row.startswith("| `transformer_blocks.*.attn`: `to_q`, `to_k`, `to_v` | 3 | W4A4 LM4 | ")
    assert row.endswith("| 16 |")


def test_an_unknown_licence_is_said_to_be_unknown(card, model):
    data = ModelCard(card).data
    assert data.license == "unknown" and data.base_model is None
    assert "Licence: unknown; ask" in card
    assert base_of(model).said == "The 16-bit model `copy of the model`."


@pytest.mark.parametrize(
    "text",
    ["", "no front matter", "---\n- a list\n---\n", "---\na: [\n---\n", "\xff", "---\n: :\n---"],
)
def test_a_damaged_card_of_the_base_tells_nothing(model, own_folder, text):
    (own_folder / "README.md").write_text(text, encoding="latin-1")
    assert base_of(model).carried == {} and base_of(model).model is None


def test_terms_and_base_are_carried_over(model, own_folder):
    (own_folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE.md\nbase_model: org/tiny\n"
        "pipeline_tag: text-to-image\nwidget: [1]\nextra: {a: 1}\n---\n# secret words"
    )
    base = base_of(model)
    assert base.model == "org/tiny"
    assert base.carried == {
        "license": "other", "license_name": "tiny", "license_link": "LICENSE.md",
        "pipeline_tag": "text-to-image",
    }  # fmt: skip


def test_figures_have_their_intervals():
    table = figures(REPORT)
    assert "| metric | packed | floor |" in table
    assert "| psnr | 30.12 [29, 31] |  |" in table
    assert "| fid | 1.5 | 0.25 |" in table
    assert "3 held-out prompts at 64 x 32, float32, on CPU" in table


def test_a_renewed_card_has_another_name_and_figures(card):
    again = renewed(card, "org/new", REPORT, pairs=True)
    assert '.from_pretrained("org/new", ' in again
    assert "\n# org/new, packed to 4 bits by DiRotQ\n" in again
    assert "30.12 [29, 31]" in again and "](pairs.png)" in again
    assert again.count(FIGURES) == 2
    assert renewed(again, "org/new", REPORT, pairs=True) == again
    assert renewed(again, "org/new") == again  # figures stay where there is no other report
    assert "pairs.png" not in renewed(card, "org/new", REPORT)
