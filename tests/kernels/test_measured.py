"""Whose measurements count for a chip, and in which order."""

import json
import logging

import pytest
import torch
from formats import spec_of

from dirotq.files.digest import cache_root
from dirotq.kernels import chip, measured
from dirotq.kernels import plan as plans
from dirotq.kernels.measured import Tuned, read_tuned, rows, tuned, tuned_folder, tuned_name
from dirotq.kernels.plan import candidates_for, choose, name_of, renew

MINE, OTHER = "NVIDIA GeForce RTX 4090", "NVIDIA L40S"
HERE, OLD = "3.7.1", "3.6.0"
BF16 = torch.bfloat16
SPEC = spec_of("rms", 3072, 9216)
PLANS = [name_of(p) for p in candidates_for(89, 4608, 9216, SPEC, BF16)]


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A machine with one GPU of sm_89, an empty cache, and no rows shipped for it."""
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "gpu_of", lambda c: MINE if c == 89 else None)
    monkeypatch.setattr(measured, "triton_version", lambda: HERE)
    monkeypatch.setattr(measured, "TABLE", tmp_path / "shipped.json")
    chip.say_once.cache_clear()
    renew()
    yield
    monkeypatch.undo()
    chip.say_once.cache_clear()
    renew()


def row(plan=PLANS[0], m=4608, n=9216, k=3072):
    return {"m": m, "n": n, "k": k, "plan": plan, "us": 9.0}


def content(*entries, gpu=MINE, triton=HERE, date="2026-11-30", chip=89, kind="w4a4"):
    return {
        "chip": chip, "gpu": gpu, "driver": "580", "triton": triton, "torch": "2.11",
        "date": date, "plans": {kind: list(entries)},
    }  # fmt: skip


def put(*entries, name=None, **more):
    value = content(*entries, **more)
    folder = tuned_folder()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (name or tuned_name(89, value["gpu"], value["triton"]))
    file.write_text(json.dumps(value))
    renew()
    return file


def ship(*entries, chip=89, kind="w4a4"):
    measured.TABLE.write_text(json.dumps({str(chip): {kind: list(entries)}}))
    renew()


def chosen(m=4608, n=9216, spec=SPEC, chip=89):
    return choose(chip, m, n, spec, BF16)


def test_the_folder_is_in_the_cache_of_everything_else(monkeypatch, tmp_path):
    for place in (str(tmp_path), ""):
        monkeypatch.setenv("DIROTQ_CACHE", place)
        assert tuned_folder() == cache_root() / "plans"
    assert tuned_name(89, MINE, HERE) == "sm_89-nvidia-geforce-rtx-4090-triton-3.7.1.json"


def test_without_a_home_there_is_no_folder(monkeypatch):
    def homeless(self):
        raise RuntimeError("Could not determine home directory")

    monkeypatch.setattr(measured.Path, "expanduser", homeless)
    assert tuned_folder() is None


def test_what_was_measured_here_is_chosen(here):
    assert chosen().why == "no measurement for sm_89"
    put(row(PLANS[-1]))
    plan = chosen()
    assert name_of(plan) == PLANS[-1]
    assert plan.why == "measured at 4608 x 3072 -> 9216 here"


def test_at_the_same_shape_the_own_gpu_wins_over_the_package(here):
    ship(row(PLANS[0]))
    assert name_of(chosen()) == PLANS[0]
    assert chosen().why == "measured at 4608 x 3072 -> 9216 on sm_89"
    put(row(PLANS[1]))
    assert name_of(chosen()) == PLANS[1]


def test_a_nearer_shape_of_the_package_wins_over_a_far_one_of_ones_own(here):
    ship(row(PLANS[0], m=4608))
    put(row(PLANS[1], m=16))
    assert name_of(chosen(m=4096)) == PLANS[0]
    assert name_of(chosen(m=32)) == PLANS[1]


def test_this_version_of_triton_wins_over_another_which_still_counts(here):
    put(row(PLANS[0]), triton=OLD, date="2026-12-01")
    assert name_of(chosen()) == PLANS[0]
    put(row(PLANS[1]), triton=HERE, date="2026-11-01")
    assert name_of(chosen()) == PLANS[1]
    assert [table.triton for table in tuned(89)] == [HERE, OLD]


def test_of_two_other_versions_the_newer_file_wins(here):
    put(row(PLANS[0]), triton="3.5.0", date="2026-01-01")
    put(row(PLANS[1]), triton=OLD, date="2026-06-01")
    assert name_of(chosen()) == PLANS[1]


def test_another_gpus_rows_are_borrowed_only_where_there_are_no_others(here):
    put(row(PLANS[0]), gpu=OTHER)
    plan = chosen()
    assert name_of(plan) == PLANS[0]
    assert plan.why == f"measured at 4608 x 3072 -> 9216 on another sm_89, {OTHER}"
    ship(row(PLANS[1], m=1))
    assert name_of(chosen()) == PLANS[1]
    ship(row(PLANS[1], m=1), kind="w4a8")  # another kind says nothing of this one
    assert name_of(chosen()) == PLANS[0]


def test_another_chips_file_says_nothing(here):
    put(row(), name="sm_90-x.json", chip=90)
    assert tuned(89) == () and rows(89, "w4a4") == ()
    assert tuned(90) == ()  # no such GPU here


def test_rows_whose_plan_is_gone_are_passed_over(here):
    put(row("of another time"), row(PLANS[1], m=1))
    assert name_of(chosen()) == PLANS[1]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("{", "Expecting"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "fields"),
        (content(row()) | {"more": 1}, "fields"),
        (content(row()) | {"gpu": 7}, "gpu is 7"),
        (content(row()) | {"chip": "89"}, "chip is '89'"),
        (content(row()) | {"chip": 90}, "not sm_89"),
        (content(row()) | {"plans": []}, "plans is"),
        (content(row(m=0)), "a row of w4a4"),
        (content(row(m=True)), "a row of w4a4"),
        (content(row(m=4.5)), "a row of w4a4"),
        (content(row(plan=7)), "a row of w4a4"),
        (content([1]), "a row of w4a4"),
        (content(row()) | {"plans": {"w4a4": {}}}, "a row of w4a4"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_said_once_and_ignored(here, caplog, damage, said):
    put(row(PLANS[1]), triton=OLD)
    file = put(row(PLANS[0]))
    file.write_text(damage if isinstance(damage, str) else json.dumps(damage))
    with pytest.raises(ValueError, match=said):
        read_tuned(file, 89)
    with caplog.at_level(logging.WARNING):
        for m in (4608, 4607, 1):
            renew()
            assert name_of(chosen(m=m)) == PLANS[1]
    (record,) = caplog.records
    assert str(file) in record.message and "`dirotq tune`" in record.message


def test_a_file_that_cannot_be_read_is_passed_over(here, caplog, monkeypatch):
    file = put(row())
    file.unlink()
    file.mkdir()
    assert tuned(89) == ()
    assert "holds no measured plans" in caplog.text


def test_a_sound_file_comes_back(here):
    file = put(row())
    table = read_tuned(file, 89)
    assert isinstance(table, Tuned)
    assert (table.shapes, table.gpu, table.plans) == (1, MINE, {"w4a4": [row()]})


def test_the_same_process_sees_a_new_file_when_told(here):
    before = chosen()
    put(row(PLANS[-1]))  # renews
    assert chosen() != before
    assert choose.cache_info().currsize == 1


def test_a_choice_costs_no_look_at_the_disk(here, monkeypatch):
    put(row(PLANS[-1]))
    first = chosen()
    monkeypatch.setattr(measured.Path, "glob", None)
    monkeypatch.setattr(plans, "candidates_for", None)
    assert chosen() is first


def test_the_first_gpu_of_a_capability_gives_the_name(monkeypatch):
    cards = [(90, "NVIDIA H200"), (89, MINE), (89, OTHER)]
    measured.gpu_of.cache_clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(measured, "capability", lambda device: cards[device.index][0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: cards[index][1])
    try:
        assert [measured.gpu_of(c) for c in (89, 90, 120)] == [MINE, "NVIDIA H200", None]
    finally:
        measured.gpu_of.cache_clear()
