"""Both sides of each decision, and what diffusers' pipelines do."""

import pytest
import torch
from tiny_pipelines import family_folder

from dirotq.models.denoisers import denoisers_of
from dirotq.quantize.guidance import FROM_ZERO, SEPARATE, branches, samples
from dirotq.sources.generation import generate
from dirotq.sources.model import DiffusersModel
from dirotq.sources.prompts import Prompt

NEGATIVE = {"negative_prompt": " "}


@pytest.mark.parametrize(
    ("call", "embedded", "forwards", "together"),
    [
        ({}, False, 1, 1),
        ({"guidance_scale": 1.0}, False, 1, 1),
        ({"guidance_scale": 1.1}, False, 2, 2),
        ({"guidance_scale": 3.5}, True, 1, 1),
        ({"true_cfg_scale": 4.0}, False, 1, 1),  # does nothing without a negative prompt
        (NEGATIVE, False, 1, 1),
        ({"true_cfg_scale": 1.0, **NEGATIVE}, False, 1, 1),
        ({"true_cfg_scale": 1.1, **NEGATIVE}, False, 2, 1),
        ({"true_cfg_scale": 1.1, "guidance_scale": 3.5, **NEGATIVE}, True, 2, 1),
        # Where there is a true scale, the other one is an input.
        ({"true_cfg_scale": 1.0, "guidance_scale": 3.5, **NEGATIVE}, False, 1, 1),
        ({"guidance_scale": 3.5, **NEGATIVE}, False, 2, 2),
    ],
)
def test_branches_and_whether_they_are_one_batch(call, embedded, forwards, together):
    assert branches(call, "Other", embedded) == forwards
    assert samples(call, "Other", embedded) == together
    for separate in SEPARATE:
        assert samples(call, separate, embedded) == 1


@pytest.mark.parametrize("transformer", FROM_ZERO)
def test_some_guide_with_any_scale(transformer):
    found = [branches({"guidance_scale": scale}, transformer, False) for scale in (0.0, 0.1)]
    assert found == [1, 2]
    assert branches({}, transformer, False) == 1


TOLD = ("flux2", "pixart", "qwen_image", "sana", "sd3", "wan", "krea2", "z_image", "hunyuan_video")
MORE = {"qwen_image": {"true_cfg_scale": 4.0, **NEGATIVE}}


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("name", TOLD)
def test_pipelines_do_so(tiny_root, name, scale):
    more = MORE.get(name, {"guidance_scale": scale})
    if name in MORE:
        more = {**more, "true_cfg_scale": scale}
    model = DiffusersModel(path=str(family_folder(tiny_root, name)), call=more)
    call = {**model.call_arguments(), "num_inference_steps": 2}
    pipe, seen = model.pipeline(torch.float32, torch.device("cpu")), []
    (denoiser,) = denoisers_of(pipe).values()

    def look(_, args, given):
        given = {**given, **dict(zip(("x",), args, strict=False))}
        seen.append(len(given.get("hidden_states", given.get("x"))))

    denoiser.register_forward_pre_hook(look, with_kwargs=True)
    generate(pipe, [Prompt(text="a star", seed=1)], call, output="latent")
    kind = type(denoiser).__name__, bool(denoiser.config.get("guidance_embeds"))
    assert set(seen) == {samples(call, *kind)}
    assert sum(seen) == 2 * branches(call, *kind)
