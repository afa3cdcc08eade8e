import dataclasses
import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_line import CALL, CAPTIONS, run_stage, stage, tree_bytes

import dirotq
from dirotq.errors import ConfigError
from dirotq.files.digest import file_digest
from dirotq.files.sums import SUMS
from dirotq.packed.swap import footprint
from dirotq.quantize.plan import read_plan
from dirotq.quantize.tensors import load_site, site_file
from dirotq.stages.pack import Pack


@pytest.fixture(scope="session")
def pack(line) -> Pack:
    return stage(line(), "pack")


@pytest.fixture(scope="session")
def inputs(finished):
    return {name: finished[name] for name in ("rank", "gptq", "fuse")}


@pytest.fixture(scope="session")
def model(finished):
    return finished["pack"].tree("model")


@pytest.fixture(scope="session")
def stored(model) -> dict[str, torch.Tensor]:
    return load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")


def test_what_the_stages_wrote_is_what_is_packed(finished, stored):
    for entry in read_plan(finished["rank"].file("plan.json")):
        file = f"sites/{site_file(entry.site.name)}"
        quantized = load_site(finished["gptq"].file(file))
        for buffer in ("qweight", "wscale"):
            assert torch.equal(stored[f"{entry.site.name}.{buffer}"], quantized[buffer])
        for name, tensor in load_site(finished["fuse"].file(file)).items():
            assert torch.equal(stored[f"{entry.site.name}.{name}"], tensor)


def test_no_packed_linear_left_its_16_bit_weight_behind(finished, stored, folder):
    original = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    packed = {c for e in read_plan(finished["rank"].file("plan.json")) for c in e.site.linears}
    for name, tensor in original.items():
        if name.rpartition(".")[0] not in packed:
            assert torch.equal(stored[name], tensor), name
        elif name.endswith(".weight"):
            assert name not in stored


def test_everything_else_of_the_pipeline_is_copied(model, folder):
    source, packed = tree_bytes(folder), tree_bytes(model)
    for name, content in source.items():
        if name.endswith("config.json") and "transformer/" not in name:
            # transformers would load these in the dtype they note: see test_registration.
            noted = json.loads(content)
            noted |= {"dtype": "float32"} if "dtype" in noted else {}
            assert json.loads(packed[name]) == noted, name
        elif not name.startswith("transformer/") and name != "generation.json":
            assert packed[name] == content, name
    assert set(packed) - set(source) == {"README.md", SUMS}
    assert json.loads(packed["generation.json"]) == CALL


def test_hidden_files_and_the_old_card_stay_behind(pack, inputs, own_folder, tmp_path):
    (own_folder / "README.md").write_text("# the 16-bit model")
    (own_folder / "training.json").write_text("{}")
    (own_folder / ".cache").write_text("x")
    moved = dataclasses.replace(pack, model=dataclasses.replace(pack.model, path=str(own_folder)))
    run_stage(moved, tmp_path, **inputs)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "packed to 4 bits by DiRotQ" in card
    assert "# the 16-bit model" not in card
    assert not (tmp_path / "model" / ".cache").exists()
    assert not (tmp_path / "model" / "training.json").exists()


def test_the_terms_of_the_base_are_carried_over(pack, inputs, own_folder, tmp_path):
    (own_folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/tiny\n---\n# x")
    (own_folder / "LICENSE").write_text("terms")
    moved = dataclasses.replace(pack, model=dataclasses.replace(pack.model, path=str(own_folder)))
    run_stage(moved, tmp_path, **inputs)
    card = (tmp_path / "model" / "README.md").read_text()
    data = ModelCard(card).data
    assert (data.license, data.base_model) == ("mit", "org/tiny")
    assert data.to_dict()["base_model_relation"] == "quantized"
    assert "Licence: mit, as the base model's." in card
    assert str(tmp_path) not in card
    assert (tmp_path / "model" / "LICENSE").read_text() == "terms"


@pytest.fixture
def packed_from(pack, inputs, tmp_path):
    """The folder that is packed from another place of the same model."""

    def run(path):
        moved = dataclasses.replace(pack.model, path=str(path))
        run_stage(dataclasses.replace(pack, model=moved), tmp_path / "out", **inputs)
        return tmp_path / "out" / "model"

    return run


def test_what_is_no_part_of_a_component_stays_behind(packed_from, own_folder, model):
    for name in (
        "notes.txt", "samples.png", "flux.safetensors", "pipeline.py", ".git/config", "old/x.json",
        "vae/model.onnx", "vae/modeling.py", "vae/x.bin", "vae/.hidden.json", "vae/sub/x.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ):  # fmt: skip
        (own_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (own_folder / name).write_text("{}")
    (own_folder / "LICENSE.md").write_text("licence")
    made = tree_bytes(packed_from(own_folder))
    assert made.pop("LICENSE.md") == b"licence"
    same = tree_bytes(model)
    for tree in (made, same):
        del tree["README.md"]  # says the model's name
    assert made == same


def test_nothing_finished_shares_an_inode_with_what_a_user_may_write(packed_from, own_folder):
    """`cp better.safetensors SOURCE/vae/...` changed the packed model too."""
    made = packed_from(own_folder)
    theirs = {p.stat().st_ino for p in own_folder.rglob("*")}
    assert not [p for p in made.rglob("*") if p.stat().st_ino in theirs or p.is_symlink()]
    before = tree_bytes(made)
    for path in own_folder.glob("*/*.safetensors"):
        path.write_bytes(b"better")
    assert tree_bytes(made) == before


def test_linked_components_and_blobs_are_resolved(packed_from, own_folder, model, tmp_path):
    home = tmp_path / "models--org--name"
    snapshot = home / "snapshots" / ("a" * 40)
    shutil.copytree(own_folder / "vae", snapshot / "vae")
    weights = snapshot / "vae" / "diffusion_pytorch_model.safetensors"
    blob = home / "blobs" / file_digest(weights)
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(f"../../../blobs/{blob.name}")
    shutil.rmtree(own_folder / "vae")
    (own_folder / "vae").symlink_to(snapshot / "vae")
    made = packed_from(own_folder)
    assert not [p for p in made.rglob("*") if p.is_symlink()]
    assert (made / "vae" / weights.name).stat().st_ino == blob.stat().st_ino
    assert tree_bytes(made / "vae") == tree_bytes(model / "vae")


def test_a_link_to_a_private_file_never_gets_there(packed_from, own_folder, tmp_path):
    (tmp_path / "id.txt").write_text("BEGIN PRIVATE KEY")
    (own_folder / "vae" / "notes.txt").symlink_to(tmp_path / "id.txt")
    with pytest.raises(ConfigError, match=r"vae/notes\.txt is a link out of"):
        packed_from(own_folder)
    assert not (tmp_path / "out" / "model" / "vae").exists()


def test_no_path_of_this_machine_is_written(model, folder, tiny_root):
    for name, content in tree_bytes(model).items():
        assert str(tiny_root).encode() not in content, name


def test_metrics_weigh_what_lies_on_disk(finished, model, stored, folder):
    metrics = finished["pack"].metrics
    size = sum(t.numel() * t.element_size() for t in stored.values())
    assert metrics["transformer_megabytes"] == pytest.approx(size / 1e6)
    original = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    parameters = sum(t.numel() for t in original.values())
    assert metrics["bits_per_parameter"] == pytest.approx(8 * size / parameters)
    assert metrics["compression"] == pytest.approx(2 * parameters / size)
    assert sum(footprint(dirotq.load(model, device="cpu").transformer).values()) == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_load_then_save_changes_no_byte(pack, inputs, tmp_path, dtype, shard):
    run_stage(dataclasses.replace(pack, shard=shard), tmp_path / "first", **inputs)
    first = tmp_path / "first" / "model"
    pipe = dirotq.load(first, device="cpu", dtype=dtype)
    pipe.transformer.save_pretrained(tmp_path / "second", max_shard_size=shard)
    before, after = tree_bytes(first / "transformer"), tree_bytes(tmp_path / "second")
    assert before == after
    assert (len(before) > 3) == (shard == "100KB")


def test_a_saved_pipeline_loads_and_draws_the_same(model, tmp_path):
    pipe = dirotq.load(model, device="cpu")
    pipe.save_pretrained(tmp_path / "again")
    again = dirotq.load(tmp_path / "again", device="cpu")
    images = [
        p(CAPTIONS[0], generator=torch.Generator().manual_seed(1), output_type="pt", **CALL).images
        for p in (pipe, again)
    ]
    assert torch.equal(*images)


def test_packing_twice_gives_the_same_bytes(pack, inputs, finished, tmp_path):
    run_stage(pack, tmp_path, **inputs)
    assert tree_bytes(tmp_path) == tree_bytes(finished["pack"].data)
