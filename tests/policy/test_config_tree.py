"""Every configuration composes, its values are the fields of what it builds, and it wires up."""

import dataclasses
import functools
import inspect
from importlib.util import find_spec

import pytest
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from dirotq.errors import DirotqError
from dirotq.pipeline import dag
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config
from dirotq.quantize.arithmetic import VIDEO

STAGES = ["capture", "basis", "rank", "gptq", "fuse", "pack", "reference", "validate"]


@functools.cache
def compose(*overrides):
    """Three tests look at each configuration, and Hydra takes most of a second to compose it."""
    group = overrides[0].partition("=")[0] if overrides else ""
    runs = {"judge": "judged", "rubric": "judged", "round": "instant"}  # idle in other pipelines
    pipeline = [f"pipeline={runs[group]}"] if group in runs else []
    return compose_config([*pipeline, *overrides], "dirotq.conf")


def choices(root):
    """group=option of every file in the tree."""
    conf = root / "conf"
    for path in sorted(conf.rglob("*.yaml")):
        if path.parent.name in ("paper", "shared"):
            continue  # composed once by the paper's rows below; a part of the judges
        if path.stem == "search" and find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
            continue  # tests/clusters composes it
        *group, option = path.relative_to(conf).with_suffix("").parts
        if group[:1] == ["experiment"]:
            yield f"experiment={'/'.join([*group[1:], option])}"
        elif group:
            yield f"{'/'.join(group)}={option}"


def pytest_generate_tests(metafunc):
    if "choice" in metafunc.fixturenames:
        # Per module: the tests of one choice run in a row, on one process, and compose it once.
        metafunc.parametrize("choice", list(choices(metafunc.config.rootpath)), scope="module")


def targets(node, name=""):
    """Every node with a ``_target_``, with its dotted name. Interpolations are not followed."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield name, node
        for key in node:
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from targets(node[key], f"{name}.{key}".lstrip("."))


def is_stage(cls):
    return hasattr(cls, "version") and hasattr(cls, "run")


def test_the_stages_in_their_order():
    cfg = compose()
    wiring = OmegaConf.to_container(cfg.pipeline)
    assert dag.order(wiring) == STAGES
    for name in STAGES:
        assert is_stage(get_class(cfg[name]._target_))


@pytest.mark.parametrize("words", [(), ("preset=instant",)])
def test_slots_fit_the_wires(words):
    """Slots without a default are all wired; of the others, those that a pipeline can fill."""
    cfg = compose(*words)
    for name, slots in OmegaConf.to_container(cfg.pipeline).items():
        parameters = inspect.signature(get_class(cfg[name]._target_).run).parameters.values()
        taken = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert {n for n, default in taken.items() if default is inspect.Parameter.empty} <= {*slots}
        assert {*slots} <= {*taken}, name
        assert words or {*slots} == {*taken}, name


def test_every_choice_composes(choice, tmp_path):
    needed = {
        "model=local": [f"model.path={tmp_path}"],
        "model=video": [f"model.path={tmp_path}"],
        "judge=local": [f"judge.backend.path={tmp_path}"],
        "judge=openai": ["judge.backend.model=NAME"],
    }
    cfg = compose(choice, *needed.get(choice, []))
    assert not OmegaConf.missing_keys(cfg)
    OmegaConf.to_container(cfg, resolve=True)  # every interpolation leads somewhere


def test_values_are_the_fields_of_what_they_build(choice):
    """A field without a YAML line could not be set from the command line; values live in YAML."""
    found = list(targets(compose(choice)))
    assert found
    for name, node in found:
        cls = get_class(node._target_)
        if dataclasses.is_dataclass(cls):
            fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
            assert set(node) - {"_target_"} == set(fields), name
            if is_stage(cls):
                for field in fields.values():
                    assert field.default is dataclasses.MISSING, f"{name}.{field.name}"


def test_every_choice_instantiates(choice):
    """Building checks values and imports classes; it needs no GPU, no network and no model."""
    methods = {  # a basis for rivals refuses methods that have no use for it
        "basis=low_rank": ["branch=beside"],
        "basis=weighted": ["branch=beside"],
        "basis=svd": ["branch=beside", "transform=smooth"],
        "basis=smooth": ["method.branch=null", "transform=smooth"],
        "branch=beside": ["basis=weighted"],
        "transform=dense": ["method.leading=null"],
        "transform=smooth": ["basis=svd", "branch=beside"],
    }
    cfg = compose(choice, *methods.get(choice, []))
    if choice in ("model=local", "model=video"):
        pytest.skip("needs the folder that it is for")
    for name in [*STAGES, *(["round"] if choice == "preset=instant" else [])]:
        try:
            instantiate(cfg[name], _convert_="all")
        except InstantiationException as error:
            assert isinstance(error.__cause__, DirotqError), error
            pytest.fail(f"{choice}: {name} refuses its own configuration: {error.__cause__}")


PAPER = {  # calls of calibration, steps, guidance (facts of the published configuration)
    "pixart_sigma": ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", 2560, 20, 4.5),
    "sana": ("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", 2560, 20, 4.5),
    "flux_dev": ("black-forest-labs/FLUX.1-dev", 3200, 25, 3.5),
    "flux_schnell": ("black-forest-labs/FLUX.1-schnell", 512, 4, 0.0),
}
METHODS = {"int_w4a4": "dirotq", "w4a8": "dirotq_w4a8", "nvfp4": "dirotq_nvfp4"}


DATA = {"mjhq": "MJHQ-30K", "sdci": "sDCI"}
# Every model with every form, on one of the two sets of prompts; a row is its three parts.
ROWS = [(m, f, list(DATA)[(i + j) % 2]) for i, m in enumerate(PAPER) for j, f in enumerate(METHODS)]


@pytest.mark.parametrize(("model", "form", "data"), ROWS)
def test_the_papers_rows_follow_its_protocol(model, form, data):
    cfg = compose(f"experiment=paper/{model}_{form}_{data}")
    assert not OmegaConf.missing_keys(cfg)
    OmegaConf.to_container(cfg, resolve=True)
    for name in ("capture", "reference", "validate"):
        instantiate(cfg[name], _convert_="all")
    folder, calls, steps, guidance = PAPER[model]
    assert cfg.model.path == folder
    assert (cfg.model.call.num_inference_steps, cfg.model.call.guidance_scale) == (steps, guidance)
    assert cfg.capture.calls == calls <= 128 * steps
    assert cfg.method.name == METHODS[form]
    assert (cfg.reference.batch, cfg.validate.batch, cfg.prompts.reader) == (1, 1, None)
    assert cfg.reference.dtype == cfg.validate.dtype
    prompts = cfg.prompts
    assert (prompts.calibration.path, prompts.calibration.count) == ("yerevann/coco-karpathy", 128)
    assert DATA[data] in prompts.heldout.path and prompts.heldout.count == 5000
    assert prompts.heldout.column == "prompt"


def test_every_row_of_the_paper_is_made_of_three_parts(root):
    """Whatever its model, its form and its prompts: so those of a composed row are those of all."""
    folder = root / "conf" / "experiment" / "paper"
    rows = {p.stem: OmegaConf.load(p) for p in folder.glob("*.yaml") if not p.stem.startswith("_")}
    assert rows == {
        f"{model}_{form}_{data}": {
            "defaults": [
                "paper/_protocol", f"paper/_{model}", f"paper/_{data}",
                {"override /method": METHODS[form]},
                *([] if form == "nvfp4" else [{"override /weight_format": "int4_channel"}]),
                "_self_",
            ]
        }
        for model in PAPER
        for form in METHODS
        for data in DATA
    }  # fmt: skip


def test_learned_metrics_add_up():
    cfg = compose("experiment=paper/flux_dev_w4a8_mjhq", "metrics=[fid,lpips]", "validate.batch=2")
    assert set(cfg.validate.learned) == {"inception_fid", "lpips"}
    assert cfg.validate.batch == 2


def test_the_default_line_plans(store_root):
    line = build(compose())
    assert [step.name for step in line.steps] == STAGES
    assert line.store.root == store_root
    assert not store_root.exists()


def test_the_judged_line_plans(tmp_path):
    openai = ["judge=openai", "judge.backend.model=NAME"]
    local = ["judge=local", f"judge.backend.path={tmp_path}"]
    (tmp_path / "config.json").write_text("{}")
    keys = set()
    for judge in ([], openai, local):
        line = build(compose("pipeline=judged", *judge))
        assert [step.name for step in line.steps] == [*STAGES, "judge"]
        keys.add(line.steps[-1].fingerprint)
        assert line.steps[:-1] == build(compose()).steps
    assert len(keys) == 3


VIDEOS = ("hunyuan_video", "hunyuan_video15", "ltx2", "wan", "wan22", "wan22_i2v")


@pytest.mark.parametrize("model", VIDEOS)
def test_lines_of_video_models_make_few_and_short_videos(model):
    cfg = compose(f"model={model}")
    sample, prompts = cfg.model.sample, cfg.prompts
    assert (prompts.calibration.count, prompts.heldout.count, cfg.capture.calls) == (4, 2, 128)
    assert (cfg.capture.batch, cfg.reference.batch, cfg.validate.batch) == (1, 1, 1)
    assert sample.height % 32 == sample.width % 32 == 0
    latent, rest = divmod(sample.num_frames - 1, 8 if model == "ltx2" else 4)
    assert (latent, rest) == (6, 0)


def test_every_video_model_is_among_them(root):
    pipelines = {path.stem for path in (root / "conf" / "model").glob("*.yaml")}
    videos = {
        name for name in pipelines - {"local", "video"} if compose(f"model={name}").model.sample
    }
    assert videos == set(VIDEOS)


def test_the_advice_to_videos_is_what_their_configurations_say(tmp_path):
    own = compose("model=video", f"model.path={tmp_path}")
    advised = compose("model=local", f"model.path={tmp_path}", *VIDEO.split())
    assert advised == own


def test_published_figures_keep_their_calibration():
    """docs/quality.md was measured with 128 captions; a model's own default is quicker."""
    for model in ("tiny_flux", "tiny_pixart"):
        assert compose(f"model={model}").prompts.calibration.count == 32
        published = compose(f"model={model}", "experiment=quality")
        assert (published.prompts.calibration.count, published.capture.calls) == (128, 512)
