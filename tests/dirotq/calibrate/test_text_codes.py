"""Text encoders calibrated: whose inputs count, in how many runs, and what is left out."""

import pytest
import torch
from tiny_line import CAPTIONS, model_folder

from dirotq.calibrate import text_codes
from dirotq.calibrate.text_codes import calibrated_codes
from dirotq.errors import NumericalError
from dirotq.kernels.weight_only import rounded
from dirotq.packed.text_encoders import choose
from dirotq.sources.model import DiffusersModel
from dirotq.sources.opening import open_pipeline
from dirotq.sources.prompts import Prompt

CPU = torch.device("cpu")
PROMPTS = [Prompt(text=text, seed=i) for i, text in enumerate(CAPTIONS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def linears(folder):
    return {name: list(choice.linears) for name, choice in choose(folder, "w4").items()}


def codes(folder, linears):
    model = DiffusersModel(path=str(folder), call={})
    return calibrated_codes(model, PROMPTS, linears, CPU, torch.float32)


@pytest.fixture(scope="module")
def found(folder, linears):
    return codes(folder, linears)


def test_they_are_gptqs_for_the_inputs_of_the_16_bit_encoder(folder, found):
    name, path = "text_encoder_2", "encoder.block.1.layer.1.DenseReluDense.wo"
    pipe, seen = open_pipeline(folder, torch.float32, CPU), []
    linear = getattr(pipe, name).get_submodule(path)
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        pipe.encode_prompt(CAPTIONS, CAPTIONS, max_sequence_length=8)
    rows = torch.cat(seen)
    want = rounded(linear.weight.data, 4, rows.mT @ rows / len(rows), len(rows))
    assert all(torch.equal(a, b) for a, b in zip(found[name][path], want, strict=True))
    assert not torch.equal(found[name][path][0], rounded(linear.weight.data, 4)[0])


def test_all_linears_have_codes_and_runs_of_one_linear_find_the_same(
    folder, linears, found, monkeypatch
):
    assert {name: list(each) for name, each in found.items()} == linears
    monkeypatch.setitem(text_codes.ROOM, "cpu", 1)
    for name, each in codes(folder, linears).items():
        assert all(torch.equal(t[0], found[name][path][0]) for path, t in each.items())


def test_linears_that_are_too_wide_are_left_out(folder, linears, monkeypatch):
    monkeypatch.setattr(text_codes, "WIDEST", 192)
    left = {path for each in codes(folder, linears).values() for path in each}
    assert left and not any(path.endswith(("wo", "fc2")) for path in left)


def test_masked_tokens_do_not_count():
    linear = torch.nn.Linear(32, 8)
    one = text_codes._Sum(linear, CPU)
    x = torch.randn(2, 3, 32)
    one.mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    linear(x)
    kept = x[one.mask.bool()]
    torch.testing.assert_close(one.total, kept.mT @ kept)
    assert one.rows == 3


def test_inputs_that_overflow_are_named(folder, linears, monkeypatch):
    add = text_codes._Sum._add

    def overflow(self, module, args):
        add(self, module, (args[0] * float("inf"),))

    monkeypatch.setattr(text_codes._Sum, "_add", overflow)
    with pytest.raises(NumericalError, match=r"text_encoder\..*inputs are not finite"):
        codes(folder, linears)
