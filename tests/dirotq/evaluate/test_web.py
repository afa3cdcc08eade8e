import pytest

from dirotq.evaluate.web import breaks, count, number


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


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (12.375, "12.38"),
        (9.5, "9.5000"),
        (0.0, "0.0000"),
        (-2.4e-14, "0.0000"),
        (-2e-6, "-2.0e-06"),
    ],
)
def test_numbers_of_tables(value, said):
    assert number(value) == said
