import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dirotq.errors import ConfigError, NumericalError, UnsupportedError
from dirotq.models.family import Site
from dirotq.models.source import DiffusersModel, generate, stacked_weight
from dirotq.pipeline.stage import fingerprint, recipe
from dirotq.prompts import Prompt


def source(folder, **call) -> DiffusersModel:
    return DiffusersModel(path=str(folder), call=call)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_identity_is_content_not_place(folder, own_folder):
    assert recipe(source(own_folder)) == recipe(source(folder))


@pytest.mark.parametrize("name", ["README.md", "training.json", "vae/samples.png"])
def test_identity_ignores_what_no_result_depends_on(folder, own_folder, name):
    (own_folder / name).write_text("about this model")
    assert recipe(source(own_folder)) == recipe(source(folder))


@pytest.mark.parametrize(
    "name",
    ["transformer/diffusion_pytorch_model.safetensors", "vae/config.json", "model_index.json"],
)
def test_identity_changes_with_one_byte(folder, own_folder, name):
    file = own_folder / name
    content = bytearray(file.read_bytes())
    if file.suffix == ".json":
        content += b" "
    else:
        content[-1] ^= 1
    file.write_bytes(content)
    before, after = (source(f).identity()["files"] for f in (folder, own_folder))
    assert {n for n in before if before[n] != after[n]} == {name}
    assert fingerprint(recipe(source(own_folder))) != fingerprint(recipe(source(folder)))


def test_identity_changes_with_the_call(folder):
    assert recipe(source(folder)) != recipe(source(folder, num_inference_steps=2))
    assert recipe(source(folder)) == recipe(source(folder, num_inference_steps=3))  # as stored


def test_call_arguments_of_family_folder_and_user(folder, own_folder):
    stored = source(folder).call_arguments()
    assert (stored["height"], stored["max_sequence_length"]) == (32, 8)
    mine = source(folder, height=64, guidance_scale=None).call_arguments()
    assert mine["height"] == 64
    assert "guidance_scale" not in mine
    (own_folder / "generation.json").unlink()
    assert source(own_folder).call_arguments()["height"] == 1024


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickles_are_refused(own_folder, part, suffix):
    (weights,) = (own_folder / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(suffix))
    with pytest.raises(ConfigError, match=rf"{part}.*pickle.*\{suffix}.*safe_serialization=True"):
        source(own_folder).folder()


def test_a_pickle_beside_safetensors_is_never_opened(own_folder):
    (own_folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"not a model")
    assert source(own_folder).transformer(torch.float32) is not None


def test_no_pipeline(tmp_path):
    (tmp_path / "photo.txt").touch()
    with pytest.raises(ConfigError, match=r"no diffusers pipeline.*photo\.txt.*save_pretrained"):
        source(tmp_path).folder()
    with pytest.raises(ConfigError, match=r"no diffusers pipeline.*found nothing"):
        source(tmp_path / "absent").folder()


def test_a_pipeline_without_a_transformer(own_folder):
    shutil.rmtree(own_folder / "transformer")
    with pytest.raises(ConfigError, match=r"no transformer/config\.json"):
        source(own_folder).folder()


def test_an_already_quantized_model(own_folder):
    config = own_folder / "transformer" / "config.json"
    edit_json(config, quantization_config={"quant_method": "x"})
    with pytest.raises(ConfigError, match=r"already quantized.*16-bit model it was made from"):
        source(own_folder).folder()


def test_an_unknown_transformer(own_folder):
    edit_json(own_folder / "transformer" / "config.json", _class_name="UNet2DConditionModel")
    with pytest.raises(UnsupportedError, match="'UNet2DConditionModel'; supported: flux"):
        source(own_folder).sites()


def test_skeleton_has_the_shapes_and_no_memory(folder):
    skeleton, real = source(folder).skeleton(), source(folder).transformer(torch.float32)
    assert all(p.is_meta for p in skeleton.parameters())
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert source(folder).sites() == source(folder).family.sites(real)


def test_weights_of_a_site_stack_in_order(folder):
    transformer = source(folder).transformer(torch.float32)
    site = next(s for s in source(folder).sites() if len(s.consumers) == 4)
    weight, bias = stacked_weight(transformer, site)
    for consumer, rows in site.slices():
        linear = transformer.get_submodule(consumer)
        assert torch.equal(weight[rows], linear.weight)
        assert torch.equal(bias[rows], linear.bias)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "bias"])
def test_weights_that_are_not_finite_name_the_linear(value, where):
    net = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 2)})
    getattr(net["k"], where).data.view(-1)[1] = value
    site = Site("qk", ("q", "k"), 4, (4, 2), "block", True)
    with pytest.raises(NumericalError, match="k: the weights hold NaN or infinity"):
        stacked_weight(net, site)


PROMPTS = [Prompt("a red circle", 3), Prompt("two small blue stars", 4)]


def test_an_image_depends_on_its_seed_and_not_on_its_batch(folder):
    model = source(folder)
    pipe = model.pipeline(torch.float32, torch.device("cpu"))
    both = generate(pipe, PROMPTS, model.call_arguments())
    assert both.shape == (2, 3, 32, 32)
    assert both.dtype == torch.float32
    for prompt, image in zip(PROMPTS, both, strict=True):
        alone = generate(pipe, [prompt], model.call_arguments())[0]
        torch.testing.assert_close(alone, image, rtol=0, atol=1e-4)
    other_seed = generate(pipe, [Prompt("a red circle", 5)], model.call_arguments())[0]
    assert (other_seed - both[0]).abs().max() > 1e-2


def test_images_that_are_not_finite_are_an_error():
    def broken(**_):
        return SimpleNamespace(images=torch.full((1, 3, 2, 2), float("nan")))

    with pytest.raises(NumericalError, match=r"non-finite image.*a red circle"):
        generate(broken, PROMPTS[:1], {})
