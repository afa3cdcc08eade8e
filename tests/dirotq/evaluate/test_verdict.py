import pytest

from dirotq.evaluate.fidelity import PSNR_LIMIT
from dirotq.evaluate.verdict import FEW, verdict


def rows(psnr, floor=None):
    found = [{"psnr": value} for value in psnr]
    if floor is not None:
        found = [row | {"floor": {"psnr": f}} for row, f in zip(found, floor, strict=True)]
    return found


@pytest.mark.parametrize(
    ("psnr", "level"),
    [
        (40.0, "close"),
        (39.9, "small"),
        (30.0, "small"),
        (29.9, "visible"),
        (20.0, "visible"),
        (19.9, "other"),
        (-3.0, "other"),
    ],
)
def test_words_by_distance_where_the_floor_is_far(psnr, level):
    found = verdict(rows([psnr] * 8, [psnr + 30] * 8), {})
    assert found["level"] == level
    assert f"{psnr:.1f} dB over 8 held-out prompts" in found["reasons"][0]
    assert "30.0 dB below that" in found["reasons"][1]


@pytest.mark.parametrize(
    ("packed", "floor", "says"),
    [
        (17.25, None, "17.2 dB below the 16-bit sound (SNR), and its spectra are 3.0 dB from"),
        (17.25, 31.0, "The 16-bit model run again has an SNR of 31.0 dB."),
        (17.25, 100.0, "The 16-bit model run again gives the same sound."),
        (100.0, None, "The sound is that of the 16-bit model."),
    ],
)
def test_the_sound_is_told_where_there_is_one(packed, floor, says):
    again = {} if floor is None else {"floor": {"mean": floor}}
    scores = {"sound_snr": {"packed": {"mean": packed}} | again}
    scores["sound_lsd"] = {"packed": {"mean": 3.0}}
    assert says in " ".join(verdict(rows([40.0] * 8), scores)["reasons"])
    assert "sound" not in " ".join(verdict(rows([40.0] * 8), {})["reasons"])


@pytest.mark.parametrize(("gap", "level"), [(0.99, "floor"), (-5.0, "floor"), (1.01, "visible")])
def test_no_farther_off_than_the_16_bit_model_itself(gap, level):
    """Whatever the PSNR: bf16 images of 25 dB are no better the second time."""
    found = verdict(rows([25.0 - gap] * 8, [25.0] * 8), {})
    assert found["level"] == level
    assert ("closer" in found["reasons"][1]) == (gap < 0)


def test_scattered_prompts_leave_it_open():
    packed = [20.0, 30.0] * 4
    assert verdict(rows(packed, [24.0] * 8), {})["level"] == "unclear"
    assert verdict(rows(packed, [34.0] * 8), {})["level"] == "visible"


def test_a_floor_without_any_difference():
    found = verdict(rows([45.0] * 8, [PSNR_LIMIT] * 8), {})
    assert "gives the same images here" in found["reasons"][1]
    assert found["level"] == "close"


def test_without_a_floor_that_is_said():
    found = verdict(rows([45.0] * 8), {})
    assert found["level"] == "close"
    assert "reference.floor=false" in found["reasons"][1]


def test_images_of_something_else_and_few_prompts_are_said():
    few = verdict(rows([45.0] * (FEW - 2) + [19.9], [60.0] * (FEW - 1)), {})
    assert f"1 of {FEW - 1} images show something else" in " ".join(few["reasons"])
    assert "are few" in few["reasons"][-1]
    many = verdict(rows([45.0] * FEW, [60.0] * FEW), {})
    assert "few" not in " ".join(many["reasons"])
    assert "something else" not in " ".join(many["reasons"])


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.05, -0.01, "3.0 points fewer of the captioned attributes"),
        (-0.05, 0.0, "no difference from 16 bit could be shown"),
        (0.01, 0.05, "3.0 points more"),
    ],
)
def test_captioned_attributes(low, high, said):
    scores = {"captioned": {"difference": {"mean": (low + high) / 2, "low": low, "high": high}}}
    told = " ".join(verdict(rows([45.0] * 8), scores)["reasons"])
    assert said in told
