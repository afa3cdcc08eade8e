import pytest

from dirotq.evaluate.web import breaks, count


def test_names_break_after_their_parts_and_stay_text():
    assert breaks("blocks.0.to_q") == "blocks.<wbr>0.<wbr>to_<wbr>q"
    assert breaks("<b>.x") == "&lt;b&gt;.<wbr>x"
    assert breaks("") == ""


@pytest.mark.parametrize(
    ("number", "said"),
    [(8000, "8,000"), (999_999, "999,999"), (2.6e6, "2.6 million"), (11.9e9, "11.90 billion")],
)
def test_numbers_of_parameters(number, said):
    assert count(number) == said
