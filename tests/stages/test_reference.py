import dataclasses

import pytest
import torch
from tiny_line import run_stage, stage
from tiny_offload import absent

from dirotq.errors import ConfigError
from dirotq.evaluate import images
from dirotq.evaluate.images import made_in, made_on, read_images, read_seconds
from dirotq.quantize.running import Way
from dirotq.sources.generation import generate, generate_with_sound
from dirotq.stages.reference import Reference, floor_batch, other_attention

pytestmark = pytest.mark.usefixtures("looks_every_time")

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def reference(line) -> Reference:
    return stage(line(), "reference")


@pytest.fixture(scope="session")
def tree(finished):
    return finished["reference"].tree("images.zarr")


def test_images_are_those_of_the_16_bit_pipeline(reference, tree, finished):
    prompts, call = reference.prompts.load(), reference.model.call_arguments()
    want = generate(reference.model.pipeline(torch.float32, CPU), prompts, call)
    torch.testing.assert_close(read_images(tree, "original"), want, atol=1e-5, rtol=0)
    assert (read_seconds(tree, "original") > 0).all()
    assert (made_on(tree, "original"), made_in(tree, "original")) == ("CPU", "float32")
    assert finished["reference"].metrics["images"] == 4


def test_the_floor_is_the_same_images_to_rounding(tree):
    """Results do not depend on the batch: every prompt has its own noise."""
    original, floor = (read_images(tree, name) for name in ("original", "floor"))
    assert original.shape == floor.shape
    torch.testing.assert_close(floor, original, atol=1e-3, rtol=0)


def test_methods_share_it(line, finished):
    for change in ("method=rtn", "rank.r=8", "capture.calls=18", "validate.batch=1"):
        (step,) = (s for s in line(change).steps if s.name == "reference")
        assert step.fingerprint == finished["reference"].fingerprint, change


def test_it_is_no_part_of_the_model(line):
    assert "reference" not in [step.name for step in line("until=pack").steps]
    assert [step.name for step in line().steps][-2:] == ["reference", "validate"]


def test_an_interrupted_run_makes_no_image_twice(reference, tree, tmp_path, monkeypatch):
    single = dataclasses.replace(reference, batch=1)
    made = []

    def stop_at_the_third(pipe, prompts, call):
        if len(made) == 2 and "again" not in made:
            made.append("again")
            raise KeyboardInterrupt
        made.append((len(prompts), [p.seed for p in prompts]))
        return generate_with_sound(pipe, prompts, call)

    monkeypatch.setattr(images, "generate_with_sound", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run_stage(single, tmp_path)
    run_stage(single, tmp_path)
    assert made == [(1, [106]), (1, [107]), "again", (2, [106, 107])]
    for name in ("original", "floor"):
        found = read_images(tmp_path / "images.zarr", name)
        torch.testing.assert_close(found, read_images(tree, name), atol=1e-3, rtol=0)


def test_nothing_is_loaded_where_nothing_is_missing(reference, tmp_path, monkeypatch):
    run_stage(reference, tmp_path)
    monkeypatch.setattr(type(reference.model), "pipeline", lambda *_: pytest.fail("loaded"))
    run_stage(reference, tmp_path)


def test_precision_is_chosen_by_name(reference, tmp_path):
    half = dataclasses.replace(reference, dtype="bfloat16", floor=False)
    run_stage(half, tmp_path)
    assert made_in(tmp_path / "images.zarr", "original") == "bfloat16"


def test_the_other_batch():
    assert [floor_batch(batch) for batch in (1, 2, 3, 8)] == [2, 1, 1, 4]


def test_attention_on_cuda_is_another_kernel():
    enabled = torch.backends.cuda
    with other_attention(torch.device("cuda"), torch.bfloat16):
        assert enabled.mem_efficient_sdp_enabled() and not enabled.flash_sdp_enabled()
        assert not enabled.cudnn_sdp_enabled()
    with other_attention(torch.device("cuda"), torch.float32):
        assert enabled.math_sdp_enabled() and not enabled.mem_efficient_sdp_enabled()
    with other_attention(CPU, torch.float32):
        assert enabled.flash_sdp_enabled()


@pytest.mark.parametrize("changes", [{"batch": 0}, {"dtype": "half"}])
def test_settings_out_of_range(reference, changes):
    with pytest.raises(ConfigError, match=r"batch=0|dtype=half"):
        dataclasses.replace(reference, **changes)


@pytest.mark.parametrize("kind", ["model", "group"])
def test_weights_that_wait_change_no_image(reference, tree, tmp_path, monkeypatch, kind):
    if kind == "group":
        absent(monkeypatch)
    monkeypatch.setattr("dirotq.stages.reference.choose_here", lambda *_: Way(kind))
    run_stage(reference, tmp_path)
    made = tmp_path / "images.zarr"
    for name in ("original", "floor"):
        assert torch.equal(read_images(made, name), read_images(tree, name))
    assert "in host memory" in made_on(made, "original")
