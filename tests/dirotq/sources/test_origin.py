"""Repositories of the hub, as the plain folder that the line sees. Local folders: test_source."""

import json
import shutil

import huggingface_hub
import pytest
from fake_hub import *  # noqa: F403
from fake_hub import COMMIT, pulled_plug
from huggingface_hub import errors
from tiny_sources import *  # noqa: F403
from tiny_sources import model, tensors_of

import dirotq.sources.hub
from dirotq.errors import ConfigError, UnsupportedError
from dirotq.pipeline.stage import recipe


def fails_with(monkeypatch, error):
    def fail(*_, **__):
        raise error

    class Api:
        repo_info = fail

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    dirotq.sources.hub._commit.cache_clear()


def test_a_plan_downloads_no_weights(hub, folder):
    tiny = model("org/tiny")
    assert tiny.identity() == {"repo": "org/tiny", "commit": COMMIT, "call": tiny.call_arguments()}
    assert tiny.call_arguments() == model(folder).call_arguments()
    assert tiny.sites() == model(folder).sites()
    assert {"model_index.json", "transformer/config.json", "tokenizer/tokenizer.json"} <= set(hub)
    assert not [name for name in hub if name.endswith((".safetensors", ".bin"))]
    assert len(hub) == len(set(hub))


def test_weights_are_downloaded_when_they_are_read_and_only_those_in_use(hub, folder):
    assert tensors_of(model("org/tiny").folder()).keys() == tensors_of(folder).keys()
    weights = {name for name in hub if not name.endswith((".json", ".txt"))}
    assert weights == {
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
    }


def test_a_single_file_needs_no_transformer_of_its_base(hub, finetune):
    model(finetune, base="org/tiny").folder()
    assert not [n for n in hub if n.startswith("transformer/") and n.endswith(".safetensors")]
    assert "vae/diffusion_pytorch_model.safetensors" in hub


def test_a_pinned_revision_is_the_same_model(hub):
    assert recipe(model(f"org/tiny@{COMMIT}")) == recipe(model("org/tiny"))


def test_what_was_downloaded_needs_no_network(hub, monkeypatch, caplog):
    before = model("org/tiny").folder()
    pulled_plug(monkeypatch)
    assert model("org/tiny").folder() == before
    assert f"main is taken to be at commit {COMMIT}" in caplog.text
    assert model(f"org/tiny@{COMMIT}").folder() == before


def response(status):
    httpx = pytest.importorskip("httpx2")
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: errors.GatedRepoError("403", response=response(403)),
         r"org/tiny .*is gated.*accept.*hf auth login"),
        (lambda: errors.RepositoryNotFoundError("404", response=response(404)),
         r"there is no model org/tiny.*no file or folder 'org/tiny' is found here"),
        (lambda: errors.RevisionNotFoundError("404", response=response(404)),
         r"no revision 'main'.*commits/main"),
        (lambda: errors.HfHubHTTPError("server says no", response=response(503)),
         r"HTTP 503: server says no\).*Try again later"),
        (lambda: errors.OfflineModeIsEnabled("offline mode is enabled"),
         r"hub can't be reached \(offline.*`hf download org/tiny`.*HF_HUB_OFFLINE"),
        (lambda: ConnectionError("no route"), r"hub can't be reached \(no route\)"),
    ],
)  # fmt: skip
def test_what_the_hub_answers_is_explained(hub, monkeypatch, error, message):
    fails_with(monkeypatch, error())
    with pytest.raises(ConfigError, match=message):
        model("org/tiny").identity()


def test_weights_that_are_not_here_without_a_network(hub, monkeypatch):
    model("org/tiny").identity()
    pulled_plug(monkeypatch)
    with pytest.raises(ConfigError, match=r"does not hold .*safetensors.*hf download org/tiny"):
        model(f"org/tiny@{COMMIT}").folder()


def test_a_repository_that_is_no_pipeline(hub, tmp_path):
    (tmp_path / "remote" / "model_index.json").unlink()
    with pytest.raises(ConfigError, match=r"no diffusers pipeline.*-Diffusers"):
        model("org/tiny").identity()


def test_a_modular_pipeline_is_named_so(hub, tmp_path):
    index = tmp_path / "remote" / "model_index.json"
    index.rename(index.with_name("modular_model_index.json"))
    for source in ("org/tiny", index.parent):
        with pytest.raises(UnsupportedError, match=r"is a modular pipeline.*no model_index\.json"):
            model(source).identity()


@pytest.mark.parametrize(
    "changes", [{"_class_name": "FluxModularPipeline"}, {"_blocks_class_name": "FluxAutoBlocks"}]
)
def test_a_modular_pipeline_in_a_plain_index(hub, tmp_path, changes):
    index = tmp_path / "remote" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    for source in ("org/tiny", index.parent):
        with pytest.raises(
            UnsupportedError, match=r"is a modular pipeline \(its model_index\.json"
        ):
            model(source).identity()


def test_a_repository_without_safetensors(hub, tmp_path):
    (tmp_path / "remote" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"component vae lacks.*not used"):
        model("org/tiny").folder()


def test_a_folder_wins_over_a_repository(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "org" / "tiny")
    assert recipe(model("org/tiny")) == recipe(model(folder))
