from types import SimpleNamespace

import pytest
import torch
from tiny_line import overrides

import dirotq
from dirotq.errors import ConfigError
from dirotq.files.digest import cache_root
from dirotq.loading import load
from dirotq.pipeline import compress as line
from dirotq.sources.saved import saved


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(line, "CONFIG", "toyline.conf")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIROTQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_comes_back(toy, store):
    made = dirotq.compress("small", "squares.power=3")
    total = made.artifacts["total"]
    assert isinstance(made, dirotq.Compressed)
    assert made.folder == total.data / "model"
    assert made.report == total.data / "report.html"
    assert list(made.artifacts) == ["numbers", "squares", "total"]
    (run,) = (store.root / "runs").iterdir()
    assert "power: 3" in (run / "config.yaml").read_text()


def test_a_run_that_stops_early(toy, tmp_path):
    made = dirotq.compress(
        "model=large", "squares.power=3", until="squares", store=tmp_path / "é,x"
    )
    assert (made.folder, made.report) == (None, None)
    assert made.artifacts["squares"].metrics["largest"] > 27
    assert made.artifacts["squares"].path.is_relative_to(tmp_path / "é,x")


@pytest.mark.parametrize(
    ("rank", "word"), [(32, "rank.r=32"), ("budget", "rank=budget"), (None, None)]
)
def test_arguments_are_overrides(monkeypatch, rank, word):
    given = []
    monkeypatch.setattr(line, "run", lambda words: given.extend(words) or {})
    dirotq.compress("flux", "capture.calls=8", method="rtn", rank=rank, device="cpu")
    words = ["model=flux", "method=rtn", word, "device=cpu", "capture.calls=8"]
    assert given == [word for word in words if word]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("nix",), "model=nix: no such model"),
        ((3,), "int is no model that can be compressed"),
        (("small", {"squares.power": 3}), "is no override; write text such as"),
        (("small", "squares.powr=3"), "did you mean `squares.power`"),
        (("small", "-m"), "is an option of `dirotq compress` alone"),
    ],
)
def test_wrong_arguments(toy, store, args, says):
    with pytest.raises(ConfigError, match=says):
        dirotq.compress(*args)
    assert not store.root.exists()


def test_a_pipeline_in_memory_is_the_model_that_its_folder_is(
    finished, folder, tiny_root, store, cache
):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    model, *words = overrides(tiny_root, store.root)
    assert model == f"model={folder}"
    made = dirotq.compress(pipe, *words, *(f"+model.call.{n}={v}" for n, v in CALL.items()))
    assert made.scores["psnr"] == pytest.approx(finished["validate"].metrics["psnr"], abs=0.01)
    assert made.scores["bits_per_parameter"] < 16
    assert "model, packed to 4 bits" in (made.folder / "README.md").read_text()
    assert list((cache / "sources").iterdir()) == []
    assert load(made.folder, device="cpu").transformer.config.quantization_config


CALL = {"num_inference_steps": 3, "guidance_scale": 0.0, "height": 32, "width": 32}
CALL |= {"max_sequence_length": 8}


def pipeline(**transformer):
    parts = {"parameters": lambda: iter([torch.empty(1)]), "config": {}} | transformer
    whole = SimpleNamespace(**parts)
    return SimpleNamespace(
        transformer=whole, components={"transformer": whole}, save_pretrained=lambda folder: None
    )


@pytest.mark.parametrize(
    ("pipe", "says"),
    [
        (SimpleNamespace(components={}, save_pretrained=print), "has no transformer"),
        (pipeline(config={"quantization_config": {}}), "is quantized already"),
        (pipeline(_hf_peft_config_loaded=True), "has adapters in its transformer"),
        (pipeline(parameters=lambda: iter([torch.empty(1, device="meta")])), "are offloaded"),
    ],
)
def test_a_pipeline_that_would_not_be_saved_as_it_is(cache, pipe, says):
    with pytest.raises(ConfigError, match=says):
        dirotq.compress(pipe)
    assert not cache.exists()


def test_no_place_for_a_pipeline(cache):
    def full(folder):
        raise OSError("no space left")

    pipe = pipeline()
    pipe.save_pretrained = full
    with pytest.raises(ConfigError, match=r"can't be saved to .*no space left.*DIROTQ_CACHE"):
        dirotq.compress(pipe)
    assert list((cache / "sources").iterdir()) == []
    cache.rename(cache.with_name("moved"))
    cache.write_text("a file")
    with pytest.raises(ConfigError, match=r"can't be saved to.*DIROTQ_CACHE"):
        dirotq.compress(pipe)


def test_an_error_of_the_run_stays_what_it_is(cache):
    with pytest.raises(OSError, match="of the run"), saved(pipeline()):
        raise OSError("of the run")
    assert list((cache_root() / "sources").iterdir()) == []
