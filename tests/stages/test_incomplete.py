"""Models that lack something: ``plan`` says so, and nothing runs."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_line import configured, overrides, run
from tiny_pipelines import PIPELINES, family_folder

import dirotq
from dirotq.cli import main


@pytest.fixture
def plan(capsys, tiny_root, store_root):
    """``dirotq plan`` on a model folder: (status, stdout, stderr)."""

    def call(folder, *more: str) -> tuple[int, str, str]:
        capsys.readouterr()
        settings = overrides(tiny_root, store_root, f"model.path='{folder}'", *more)
        with pytest.raises(SystemExit) as left:
            main(["plan", *settings])
        return (left.value.code, *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("text_encoder_2", lambda t: {"module." + n: x for n, x in t.items()}, "'module.' before"),
        ("transformer", lambda t: t | {"x.lora_A.weight": torch.ones(1)}, "x.lora_A.weight"),
        ("vae", lambda t: {n: x for n, x in t.items() if "decoder.conv_out" not in n}, "conv_out"),
    ],
)
def test_plan_refuses(plan, own_folder, part, change, said):
    (file,) = (own_folder / part).glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    status, _, err = plan(own_folder)
    assert status == 2
    assert "Traceback" not in err
    assert f"{part} (" in err
    assert said in err


def test_plan_refuses_a_block_more_than_the_config_has(plan, own_folder):
    (file,) = (own_folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    more = {
        n.replace("transformer_blocks.0.", "transformer_blocks.1."): t.clone()
        for n, t in tensors.items()
    }
    save_file(tensors | more, file, metadata={"format": "pt"})
    status, _, err = plan(own_folder)
    assert status == 2
    assert "transformer (FluxTransformer2DModel) holds" in err
    assert "transformer_blocks.1." in err


def test_plan_refuses_a_lost_vocabulary(plan, own_folder):
    (own_folder / "tokenizer" / "tokenizer.json").unlink()
    status, _, err = plan(own_folder)
    assert status == 2
    assert "tokenizer (CLIPTokenizer) has no tokenizer.json" in err


def test_plan_says_how_much_stays_in_16_bits(plan, folder):
    status, out, _ = plan(folder)
    assert status == 0
    assert "1.3 % of the block parameters stay in 16 bits" in out
    status, _, err = plan(folder, "rank.least_packed=0.99")
    assert status == 2
    assert "rank.least_packed=0.98 goes on with it" in err
    assert plan(folder, "rank.least_packed=0.98")[0] == 0


def test_the_share_is_a_metric_and_no_part_of_the_recipe(finished, line):
    for stage in ("rank", "pack"):
        assert finished[stage].metrics["block_parameters_kept"] == pytest.approx(0.0133, abs=1e-4)
    again = run(line("rank.least_packed=0.1", "until=rank"))
    assert again["rank"].path == finished["rank"].path
    manifest = json.loads((finished["rank"].path / "manifest.json").read_text())
    assert "least_packed" not in json.dumps(manifest)


def test_sd3_without_t5_is_packed_and_loaded(tiny_root, store_root, tmp_path):
    folder = shutil.copytree(family_folder(tiny_root, "sd3"), tmp_path / "sd3")
    index = json.loads((folder / "model_index.json").read_text())
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / part)
        index[part] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    artifacts = run(configured(tiny_root, store_root, f"model.path={folder}", "until=pack"))
    pipe = dirotq.load(artifacts["pack"].path, device="cpu")
    assert pipe.text_encoder_3 is None
    image = pipe("dots", **PIPELINES["sd3"].call, output_type="pt").images
    assert image.isfinite().all()
