import json
import shutil
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from dirotq.errors import ArtifactError, ConfigError, NumericalError, UnsupportedError
from dirotq.evaluate.images import ImageWriter, generate_all, read_images, read_seconds
from dirotq.pipeline.stage import fingerprint, recipe
from dirotq.sources.generation import generate
from dirotq.sources.model import DiffusersModel
from dirotq.sources.opening import open_pipeline
from dirotq.sources.prompts import Prompt, PromptSet
from dirotq.sources.weights import Weights, refuse_quantized


def source(folder, **call) -> DiffusersModel:
    return DiffusersModel(path=str(folder), call=call)


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_identity_is_content_not_place(folder, own_folder):
    assert recipe(source(own_folder)) == recipe(source(folder))


def test_sites_are_found_once_and_lists_of_them_are_the_callers(folder, monkeypatch):
    model = source(folder)
    found = model.sites()
    count = len(found)
    found.clear()
    monkeypatch.setattr(DiffusersModel, "skeleton", None)
    assert len(model.sites()) == count > 0
    assert recipe(model) == recipe(source(folder))


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


def test_sample_arguments_are_those_of_the_call_but_for_the_sample(folder):
    call = source(folder).call_arguments()
    assert source(folder).sample_arguments() == call
    mine = DiffusersModel(
        path=str(folder), call={"height": 64}, sample={"height": 32, "width": None}
    )
    assert mine.call_arguments() == call | {"height": 64}
    assert mine.sample_arguments() == {n: v for n, v in call.items() if n != "width"} | {
        "height": 32
    }
    assert mine.as_called().sample_arguments() == mine.call_arguments()


def test_identity_changes_with_a_sample_that_differs_from_the_call(folder):
    plain = source(folder)
    assert plain.identity().keys() == {"files", "call"}  # as before there were samples
    same = DiffusersModel(path=str(folder), call={}, sample={"height": 32})
    assert recipe(same) == recipe(plain)
    other = DiffusersModel(path=str(folder), call={}, sample={"height": 64})
    want = {"sample": plain.call_arguments() | {"height": 64}}
    assert other.identity() == plain.identity() | want


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_pickles_are_refused(own_folder, part, suffix):
    (weights,) = (own_folder / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(suffix))
    with pytest.raises(ConfigError, match=rf"{part}.*pickle.*\{suffix}.*safe_serialization=True"):
        source(own_folder).folder()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("flux-q4.gguf", r"It has flux-q4\.gguf\. Files of other names"),
        ("diffusion_pytorch_model.fp16.safetensors", r"from_pretrained\(folder, variant='fp16'\)"),
        ("diffusion_pytorch_model.fp16-00001-of-00001.safetensors", "variant='fp16'"),
        ("weights.safetensors", r"are not used\. Download"),
        ("notes.txt", r"lacks \S+ or \S+\. Files of other names .* are not used\. Download"),
    ],
)
def test_weights_of_other_names_are_named(own_folder, name, says):
    (weights,) = (own_folder / "transformer").glob("*.safetensors")
    weights.rename(weights.with_name(name))
    with pytest.raises(ConfigError, match=says):
        source(own_folder).folder()


def test_a_file_of_another_suffix_is_no_pipeline(own_folder, tmp_path):
    (tmp_path / "x.sft").touch()
    with pytest.raises(ConfigError, match=r"x\.sft is no file of a kind that is read: .*rename"):
        DiffusersModel(path=str(tmp_path / "x.sft"), base=str(own_folder), call={}).folder()
    with pytest.raises(ConfigError, match="is a whole pipeline"):
        DiffusersModel(path=str(own_folder), base=str(own_folder), call={}).folder()


def test_a_pickle_beside_safetensors_is_never_opened(own_folder):
    (own_folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"not a model")
    assert source(own_folder).weights().files
    assert source(own_folder).pipeline(torch.float32, torch.device("cpu")).transformer is not None


def test_an_index_that_names_a_pickle_is_refused_before_it_is_loaded(own_folder, monkeypatch):
    """transformers would hand it to torch.load."""
    part = own_folder / "text_encoder"
    (weights,) = part.glob("*.safetensors")
    weights.rename(part / "pytorch_model.bin")
    names = dict.fromkeys(load_file(part / "pytorch_model.bin"), "pytorch_model.bin")
    index = part / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    # Where nothing else lies, the pickle itself is the first thing to say.
    with pytest.raises(ConfigError, match="pickle"):
        source(own_folder).identity()
    save_file({}, part / "other.safetensors")
    monkeypatch.setattr(torch, "load", None)
    for look in (
        source(own_folder).identity,
        lambda: source(own_folder).pipeline(torch.float32, torch.device("cpu")),
        lambda: open_pipeline(own_folder, torch.float32, torch.device("cpu")),
    ):
        with pytest.raises(ConfigError, match=r"names pytorch_model\.bin.*can run code"):
            look()


def test_shards_of_the_transformer_elsewhere(own_folder):
    part = own_folder / "transformer"
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    shutil.move(part / "diffusion_pytorch_model.safetensors", own_folder.parent / "x.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "../../x.safetensors"}}))
    for look in (source(own_folder).identity, lambda: Weights(part)):
        with pytest.raises(ConfigError, match=r"names '\.\./\.\./x\.safetensors'.*no plain name"):
            look()


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


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_an_already_quantized_model(own_folder, part):
    config = own_folder / part / "config.json"
    edit_json(config, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UnsupportedError, match=rf"its {part} .*bitsandbytes.*16-bit model it was"):
        source(own_folder).folder()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_weights_of_fewer_than_16_bits(own_folder, dtype):
    (file,) = (own_folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"proj_out.weight": tensors["proj_out.weight"].to(dtype)}, file)
    with pytest.raises(UnsupportedError, match=r"/.*proj_out\.weight is stored as (F8|I8)"):
        source(own_folder).identity()


def test_an_unknown_transformer(own_folder):
    edit_json(own_folder / "transformer" / "config.json", _class_name="NewTransformer2DModel")
    edit_json(own_folder / "model_index.json", transformer=["diffusers", "NewTransformer2DModel"])
    with pytest.raises(
        UnsupportedError,
        match=r"'NewTransformer2DModel' is no transformer class .*described are flux",
    ):
        source(own_folder).sites()


@pytest.mark.parametrize(("saved", "newer"), [("999.1.0.dev0", True), ("0.1.0", False), (7, True)])
def test_a_class_of_a_newer_diffusers(own_folder, saved, newer):
    versions = {"_diffusers_version": saved}
    entry = ["diffusers", "NewTransformer2DModel"]
    edit_json(own_folder / "transformer" / "config.json", _class_name=entry[1], **versions)
    edit_json(own_folder / "model_index.json", transformer=entry, **versions)
    with pytest.raises(UnsupportedError, match=rf"diffusers {diffusers.__version__}") as caught:
        source(own_folder).sites()
    assert (f"saved by {saved}: pip install -U 'diffusers>=" in str(caught.value)) is newer
    edit_json(own_folder / "model_index.json", _class_name="NewPipeline")
    with pytest.raises(ConfigError, match=r"'NewPipeline'.* installed diffusers \d") as caught:
        source(own_folder).folder()
    assert (f"saved by {saved}: pip" in str(caught.value)) is newer


def test_a_misspelt_class_and_none(own_folder):
    """Both files say the same."""
    wrong = "FluxTransfomer2DModel"
    edit_json(own_folder / "transformer" / "config.json", _class_name=wrong)
    edit_json(own_folder / "model_index.json", transformer=["diffusers", wrong])
    with pytest.raises(UnsupportedError, match=r"did you mean `FluxTransformer2DModel`\?"):
        source(own_folder).sites()
    for value in (None, 3):
        edit_json(own_folder / "transformer" / "config.json", _class_name=value)
        with pytest.raises(ConfigError, match=rf"config\.json says {value} as its _class_name"):
            source(own_folder).folder()
    (own_folder / "transformer" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"lists a transformer .*has no transformer/config\.json"):
        source(own_folder).folder()


def test_weights_of_64_bits_are_whole(own_folder):
    (file,) = (own_folder / "transformer").glob("*.safetensors")
    save_file({name: tensor.double() for name, tensor in load_file(file).items()}, file)
    source(own_folder).check()


def test_an_index_that_names_another_transformer(own_folder):
    edit_json(own_folder / "model_index.json", transformer=["diffusers", "SD3Transformer2DModel"])
    with pytest.raises(ConfigError, match=r"contradicts itself.*SD3Transf.*FluxTransformer2DModel"):
        source(own_folder).folder()


def test_a_unet_is_not_for_us(own_folder):
    index = json.loads((own_folder / "model_index.json").read_text())
    del index["transformer"]
    index |= {"_class_name": "StableDiffusionXLPipeline", "unet": ["diffusers", "UNet2DCondition"]}
    (own_folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedError, match=r"StableDiffusionXLPipeline\) denoises with a UNet"):
        source(own_folder).folder()


def test_a_pipeline_with_code_of_its_own(own_folder):
    edit_json(own_folder / "model_index.json", _class_name=["pipeline_mine", "MyPipeline"])
    with pytest.raises(UnsupportedError, match=r"needs code of its own.*MyPipeline"):
        source(own_folder).folder()


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_index(own_folder, content):
    (own_folder / "model_index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model_index\.json is (damaged|no JSON object)"):
        source(own_folder).folder()


def test_a_truncated_weights_file(own_folder):
    (file,) = (own_folder / "transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"transformer/.*not written to its end"):
        source(own_folder).folder()


def test_a_missing_shard(own_folder):
    part = own_folder / "transformer"
    (file,) = part.glob("*.safetensors")
    file.rename(part / "diffusion_pytorch_model-00001-of-00002.safetensors")
    shards = {"a": "diffusion_pytorch_model-00001-of-00002.safetensors",
              "b": "diffusion_pytorch_model-00002-of-00002.safetensors"}  # fmt: skip
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ConfigError, match=r"component transformer lacks .*-00002-of-00002"):
        source(own_folder).folder()


def test_a_variant_is_no_weights_file(own_folder):
    (file,) = (own_folder / "vae").glob("*.safetensors")
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(ConfigError, match=r"component vae lacks .*fp16 or ema variants"):
        source(own_folder).folder()


def test_skeleton_has_the_shapes_and_no_memory(folder):
    skeleton = source(folder).skeleton()
    real = source(folder).pipeline(torch.float32, torch.device("cpu")).transformer
    assert all(p.is_meta for p in skeleton.parameters())
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    shapes = source(folder).shapes().state_dict()
    assert all(tensor.is_meta for tensor in shapes.values())
    assert {n: t.shape for n, t in shapes.items()} == {
        n: t.shape for n, t in skeleton.state_dict().items()
    }
    assert source(folder).sites() == source(folder).family.sites(real)


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


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(tmp_path):
    """The trained model in float32: every prompt has its own noise, and no row looks at another."""
    model = DiffusersModel(path="assets://tiny-flux", call={"num_inference_steps": 1})
    prompts = PromptSet(path="assets://prompts/tiny_heldout.jsonl", start=0, count=3).load()
    pipe, call = model.pipeline(torch.float32, torch.device("cpu")), model.call_arguments()
    for batch in (1, 2):  # 2: a whole batch and a single image
        writer = ImageWriter(tmp_path, f"by{batch}", 3)
        generate_all(writer, pipe, prompts, call, batch, "images")
    one, two = (read_images(tmp_path, f"by{batch}") for batch in (1, 2))
    torch.testing.assert_close(two, one, atol=1e-4, rtol=0)
    assert (one[0] - one[1]).abs().mean() > 0.05  # and they are three images
    backwards = generate(pipe, prompts[::-1], call)
    torch.testing.assert_close(backwards.flip(0), one, atol=1e-4, rtol=0)


def test_each_batch_is_on_disk_before_the_next(tmp_path):
    prompts = [Prompt("a", seed) for seed in range(3)]

    def pipe(prompt, generator, output_type, value):
        assert int(read_seconds(tmp_path, "packed").isfinite().sum()) == generator[0].initial_seed()
        return SimpleNamespace(images=torch.full((len(prompt), 3, 4, 4), value))

    writer = ImageWriter(tmp_path, "packed", 3)
    generate_all(writer, pipe, prompts, {"value": 0.5}, 2, "images")
    assert not writer.missing(2)
    generate_all(writer, None, prompts, {}, 2, "images")  # nothing is left to make


@pytest.mark.parametrize(
    ("name", "dtype", "refused"),
    [
        ("conv.weight", "I32", True),
        ("conv.bias", "U16", True),
        ("mask.weight", "BOOL", True),
        ("conv.weight", "I8", True),
        ("scale", "F8_E4M3", True),
        ("conv.weight", "BF16", False),
        ("conv.weight", "F16", False),
        ("position_ids", "I64", False),
        ("norm.num_batches_tracked", "I64", False),
    ],
)
def test_weights_are_numbers_of_at_least_16_bits(name, dtype, refused):
    header = {name: (dtype, (1,))}
    if refused:
        with pytest.raises(UnsupportedError, match=f"{name} is stored as {dtype}"):
            refuse_quantized(header, "a file")
    else:
        refuse_quantized(header, "a file")
