"""A packed pipeline is saved, and pushed, with all that lies beside its components."""

import json
import pickle
import shutil
from pathlib import Path

import diffusers.pipelines.pipeline_utils as theirs
import pytest
import torch
from diffusers import DiffusionPipeline, FluxImg2ImgPipeline, FluxPipeline
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from tiny_line import CALL, CAPTIONS, run

import dirotq
from dirotq.files.sums import SUMS, check_sums, write_sums
from dirotq.packed.card import is_ours

PERSONAL = "---\nlicense: mit\n---\n# mine\n"


def image(pipe) -> torch.Tensor:
    noise = torch.Generator("cpu").manual_seed(1)
    return pipe(CAPTIONS[0], generator=noise, output_type="pt", **CALL).images.float()


@pytest.fixture
def pipe(packed_folder):
    (packed_folder / "LICENSE.md").write_text("terms")
    return dirotq.load(packed_folder, device="cpu")


class FakeHub:
    """``pushed`` holds the files of the last upload; ``card`` lies in the repository before it."""

    card: str | None = None
    pushed: dict[str, bytes]

    def create_repo(self, repo_id, **_):
        return type("Url", (), {"repo_id": f"org/{repo_id}"})

    def load(self, repo_id, **_):
        if self.card is None:
            response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
            raise RepositoryNotFoundError("no such repository", response=response)
        return ModelCard(self.card)

    def upload_folder(self, *, folder_path, **_):
        root = Path(folder_path)
        files = [p for p in root.rglob("*") if p.is_file()]
        self.pushed = {p.relative_to(root).as_posix(): p.read_bytes() for p in files}
        self.sums = (root / SUMS).exists() and check_sums(root)
        return "commit"


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    for module in (hub_utils, theirs):
        monkeypatch.setattr(module, "create_repo", fake.create_repo)
    monkeypatch.setattr(hub_utils, "upload_folder", fake.upload_folder)
    monkeypatch.setattr(hub_utils.ModelCard, "load", fake.load)
    return fake


@pytest.mark.parametrize(
    "options", [{}, {"variant": "fp16", "max_shard_size": "100KB"}, {"safe_serialization": False}]
)
@pytest.mark.parametrize("cls", [FluxPipeline, FluxImg2ImgPipeline])
def test_what_lies_beside_is_kept(pipe, packed_folder, tmp_path, options, cls):
    want = image(pipe)
    target = tmp_path / "a b"
    cls.from_pipe(pipe).save_pretrained(target, **options)
    for name in ("generation.json", "LICENSE.md"):
        assert (target / name).read_bytes() == (packed_folder / name).read_bytes()
    text, old = (target / "README.md").read_text(), (packed_folder / "README.md").read_text()
    assert text == old.replace("# model, ", "# a b, ").replace('("model"', '("a b"')
    assert check_sums(target)
    if options == {} or "variant" in options:
        again = dirotq.load(target, device="cpu")
        assert torch.equal(image(FluxPipeline.from_pipe(again)), want)


def test_what_is_not_there_is_written_anew(packed_folder, tmp_path):
    for name in ("README.md", "generation.json", SUMS):
        (packed_folder / name).unlink()
    pipe = dirotq.load(packed_folder, device="cpu")
    shutil.rmtree(packed_folder)  # what was read is enough
    pipe.save_pretrained(tmp_path / "new")
    card = (tmp_path / "new" / "README.md").read_text()
    assert "20 linears in 13 sites" in card and "is not recorded" in card
    assert "0.27 M parameters" in card
    call = json.loads((tmp_path / "new" / "generation.json").read_text())
    assert call["num_inference_steps"] == 28  # FLUX's
    assert check_sums(tmp_path / "new")


def test_a_card_that_somebody_wrote_stays(pipe, packed_folder, tmp_path):
    (tmp_path / "README.md").write_text(PERSONAL)
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == PERSONAL
    (packed_folder / "README.md").write_text(PERSONAL)
    dirotq.load(packed_folder, device="cpu").save_pretrained(tmp_path / "x")
    assert (tmp_path / "x" / "README.md").read_text() == PERSONAL


def test_a_pipeline_of_a_store_brings_its_figures(line, tmp_path):
    made = run(line())
    pipe = dirotq.load(made["pack"].path, device="cpu")
    pipe.save_pretrained(tmp_path)
    text, report = (tmp_path / "README.md").read_text(), made["validate"].file("report.json")
    psnr = json.loads(report.read_text())["scores"]["psnr"]["packed"]
    assert f"| psnr | {psnr['mean']:.4g} [{psnr['low']:.4g}, {psnr['high']:.4g}]" in text
    assert (tmp_path / "pairs.png").read_bytes() == made["validate"].file("pairs.png").read_bytes()
    assert "](pairs.png)" in text


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_the_hub_gets_our_card(pipe, packed_folder, tmp_path, hub, way):
    if way == "push_to_hub":
        assert pipe.push_to_hub("tiny") == "commit"
    else:
        pipe.save_pretrained(str(tmp_path / "tiny"), push_to_hub=True, repo_id="tiny")
    assert {"README.md", "generation.json", "LICENSE.md", SUMS} < set(hub.pushed) and hub.sums
    card = hub.pushed["README.md"].decode()
    assert is_ours(card) and '.from_pretrained("org/tiny", ' in card
    assert hub.pushed["generation.json"] == (packed_folder / "generation.json").read_bytes()


def test_a_card_on_the_hub_stays(pipe, hub):
    hub.card = PERSONAL
    pipe.push_to_hub("tiny")
    assert b"# mine" in hub.pushed["README.md"] and b"DiRotQ" not in hub.pushed["README.md"]


def test_other_pipelines_are_saved_as_ever(folder, tmp_path, hub):
    plain = FluxPipeline.from_pretrained(folder)
    plain.save_pretrained(tmp_path)
    assert not {"README.md", "generation.json", SUMS} & {p.name for p in tmp_path.iterdir()}
    plain.push_to_hub("plain")
    assert b"automatically generated" in hub.pushed["README.md"]


def test_an_uploaded_folder_loads(pipe, tmp_path, hub):
    pipe.push_to_hub("tiny")
    for name, content in hub.pushed.items():
        (tmp_path / "down" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    again = DiffusionPipeline.from_pretrained(tmp_path / "down")
    assert torch.equal(image(again), image(pipe))
    write_sums(tmp_path / "down")


@pytest.mark.parametrize("reachable", [True, False])
def test_a_pipeline_of_the_hub_fetches_its_card_when_it_is_saved(
    packed_folder, tmp_path, monkeypatch, reachable, caplog
):
    """diffusers downloads the components, and neither card nor call."""
    root = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("a" * 40)
    left = {name: (packed_folder / name).read_bytes() for name in ("README.md", "generation.json")}
    for name in (*left, SUMS):
        (packed_folder / name).unlink()
    shutil.copytree(packed_folder, root)

    def download(repo, name, *, revision, cache_dir):
        assert (repo, revision, cache_dir) == ("org/tiny", "a" * 40, tmp_path / "hub")
        if not reachable:
            raise LocalEntryNotFoundError("no network")
        (root / name).write_bytes(left[name])
        return str(root / name)

    monkeypatch.setattr("dirotq.packed.beside.hf_hub_download", download)
    DiffusionPipeline.from_pretrained(root).save_pretrained(tmp_path / "model")
    saved = {name: (tmp_path / "model" / name).read_bytes() for name in left}
    assert (saved == left) == reachable
    assert ("written anew" in caplog.text) != reachable
    assert is_ours(saved["README.md"].decode())


def test_what_lies_beside_goes_through_pickle(pipe, packed_folder, tmp_path):
    again = pickle.loads(pickle.dumps(pipe))  # noqa: S301
    want = (packed_folder / "LICENSE.md").read_bytes()
    shutil.rmtree(packed_folder)
    again.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "LICENSE.md").read_bytes() == want
    assert is_ours((tmp_path / "model" / "README.md").read_text())


def test_no_private_file_comes_along_through_a_link(packed_folder, tmp_path):
    (tmp_path / "private").write_text("secret")
    (packed_folder / "LICENSE").symlink_to(tmp_path / "private")
    (packed_folder / "NOTICE").symlink_to("README.md")
    dirotq.load(packed_folder, device="cpu").save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "LICENSE").exists()
    assert (tmp_path / "model" / "NOTICE").read_bytes() == (
        packed_folder / "README.md"
    ).read_bytes()
