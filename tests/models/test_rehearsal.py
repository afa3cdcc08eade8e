"""One call without weights: what works passes, and what can't be called is found."""

import json
import shutil
from collections import Counter

import diffusers
import pytest
from tiny_parts import video_autoencoder
from tiny_pipelines import PICTURED, PIPELINES, UNTABLED, family_folder

from dirotq.models import rehearsal
from dirotq.models.rehearsal import UnreachedError, rehearse
from dirotq.sources.model import DiffusersModel


def arguments(folder) -> dict:
    return DiffusersModel(path=str(folder), call={}).call_arguments()


@pytest.mark.parametrize("name", ["flux", *PIPELINES, *UNTABLED, *PICTURED])
def test_every_pipeline_that_works_passes(tiny_root, name):
    folder = family_folder(tiny_root, name)
    rehearse(folder, **arguments(folder))


def _configured(part: str, **values):
    def change(folder) -> None:
        file = folder / part
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def _put(part: str, made):
    def change(folder) -> None:
        made().save_pretrained(folder / part)
        _configured("model_index.json", **{part: ["diffusers", type(made()).__name__]})(folder)

    return change


def _other_latents():
    like = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4
    }  # fmt: skip
    return diffusers.AutoencoderKL(**like, **blocks, latent_channels=8)


TRANSFORMER, VAE = "transformer/config.json", "vae/config.json"


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("flux", _configured(TRANSFORMER, axes_dims_rope=[8, 12, 14]), "The size of tensor"),
        ("flux", _configured(TRANSFORMER, axes_dims_rope=[8, 12, 8]), "The size of tensor"),
        ("qwen_image", _configured(TRANSFORMER, axes_dims_rope=[8, 12, 14]), "The size of tensor"),
        ("z_image", _configured(TRANSFORMER, axes_lens=[2, 2, 2]), "out of bounds"),
        ("pixart", _put("vae", _other_latents), "expected input"),
        ("wan", _configured(VAE, latents_mean=[0.0] * 3), "is invalid for input of size 3"),
        ("flux", _configured(VAE, scaling_factor=None), "unsupported operand"),
        ("flux", _put("scheduler", diffusers.DDIMScheduler), "does not support custom sigmas"),
        ("flux", _configured("scheduler/scheduler_config.json", max_shift=None), "NoneType"),
        ("flux", _put("scheduler", diffusers.UniPCMultistepScheduler), "use_flow_sigmas"),
    ],
)
def test_parts_that_do_not_fit_are_found(tiny_root, tmp_path, name, change, says):
    """Every tensor has the shape that its own config says."""
    folder = tmp_path / "model"
    shutil.copytree(family_folder(tiny_root, name), folder)
    change(folder)
    with pytest.raises(Exception, match=says) as found:
        rehearse(folder, **arguments(folder))
    assert not isinstance(found.value, UnreachedError)


def test_another_autoencoder_of_the_same_latents_passes(tiny_root, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(family_folder(tiny_root, "wan"), folder)
    _put("vae", lambda: video_autoencoder(diffusers.AutoencoderKLWan))(folder)
    rehearse(folder, **arguments(folder))


def test_what_nobody_can_give_is_no_misfit(tiny_root, tmp_path):
    """It wants a picture of edges, which is no argument of ours."""
    folder = tmp_path / "model"
    shutil.copytree(family_folder(tiny_root, "flux"), folder)
    _configured("model_index.json", _class_name="FluxControlPipeline")(folder)
    with pytest.raises(UnreachedError):
        rehearse(folder, **arguments(folder))


def test_a_denoiser_runs_once_for_calls_that_look_alike(tiny_root, monkeypatch):
    """Of twenty steps, both experts are called; the size is that of a small call."""
    shapes: Counter = Counter()
    plain = diffusers.WanTransformer3DModel.forward

    def forward(self, hidden_states, *args, **kwargs):
        shapes[id(self), tuple(hidden_states.shape)] += 1
        return plain(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(diffusers.WanTransformer3DModel, "forward", forward)
    folder = family_folder(tiny_root, "wan22")
    wanted = {"num_inference_steps": 20, "height": 1024, "width": 64, "num_frames": 81}
    rehearse(folder, **arguments(folder) | wanted)
    assert len({network for network, _ in shapes}) == 2
    assert set(shapes.values()) == {1}
    factor = rehearsal.SIZE // 8
    assert {shape[2:] for _, shape in shapes} == {(1 + rehearsal.FRAMES // 4, factor, 8)}
