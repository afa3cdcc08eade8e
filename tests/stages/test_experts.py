"""A pipeline of two experts, of Wan 2.2's kind: each is calibrated, packed and loaded."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from tiny_families import TINY
from tiny_line import LINE, run, run_stage, stage, tree_bytes
from tiny_pipelines import family_folder

import dirotq
from dirotq.calibrate.replay import Replay
from dirotq.errors import ArtifactError, ConfigError, UnsupportedError
from dirotq.exports.export import export
from dirotq.kernels.linear import QuantLinear
from dirotq.models.denoisers import alone, denoisers_of
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config
from dirotq.quantize import replayed_moments
from dirotq.quantize.moments import Captured, moment
from dirotq.quantize.plan import read_plan
from dirotq.quantize.running import CONTEXT, Way, of_folder
from dirotq.sources.model import DiffusersModel
from dirotq.sources.opening import place

EXPERTS = ("transformer", "transformer_2")
BOUNDARY = 750.0


@pytest.fixture(scope="module")
def experts(tiny_root):
    """The line of two experts: ``experts("rank.r=8")``."""
    prompts = tiny_root / "experts.jsonl"
    texts = ("circle", "a small star", "square", "line", "cross", "ring", "dot", "an arc")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))

    def configured(*more: str, line=LINE):
        overrides = [
            f"model={family_folder(tiny_root, 'wan22')}",
            f"prompts.calibration.path={prompts}",
            f"prompts.heldout.path={prompts}",
            f"store={tiny_root / 'experts'}",
            "method.text_group=64",
            *line,
            *more,
        ]
        return build(compose_config(overrides, "dirotq.conf"))

    return configured


@pytest.fixture(scope="module")
def made(experts):
    return run(experts())


@pytest.fixture
def own(tiny_root, tmp_path):
    """A copy of the 16-bit folder to damage."""
    return shutil.copytree(family_folder(tiny_root, "wan22"), tmp_path / "wan22")


@pytest.fixture
def packed(made, tmp_path):
    return shutil.copytree(made["pack"].tree("model"), tmp_path / "packed")


@pytest.fixture(scope="module")
def deep(tiny_root):
    """A 16-bit folder whose expert of low noise has a block more."""
    folder = shutil.copytree(family_folder(tiny_root, "wan22"), tiny_root / "deep")
    second = TINY["wan"].build(seed=1, num_layers=3).to(torch.bfloat16)
    second.save_pretrained(folder / "transformer_2")
    return folder


@pytest.fixture(scope="module")
def loaded(experts, deep):
    """That folder, packed and loaded."""
    made = run(experts(f"model={deep}", "until=pack"))
    assert made["fuse"].metrics["network_error"] < 1e-5
    return dirotq.load(made["pack"].tree("model"), device="cpu")


def edit(folder, **values):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_one_plan_holds_the_sites_of_both(made):
    plan = read_plan(made["rank"].file("plan.json"))
    table = TINY["wan"].family.sites(TINY["wan"].build())
    for part in EXPERTS:
        found = [e.site for e in plan if e.site.name.startswith(f"{part}.")]
        assert [alone(site, part) for site in found] == table
    assert len(plan) == 2 * len(table)


def test_each_is_calibrated_on_the_steps_that_it_serves(made):
    captured = Captured(made["capture"])
    for entry in read_plan(made["rank"].file("plan.json")):
        high = entry.site.name.startswith("transformer.")
        times = captured.timesteps(entry.site)
        assert times
        assert all(t is not None and (t >= BOUNDARY) == high for t in times)
    assert made["fuse"].metrics["network_error"] < 1e-5


def test_the_packed_folder_loads_and_is_offloaded(made, tmp_path):
    folder = made["pack"].tree("model")
    for part in EXPERTS:
        config = json.loads((folder / part / "config.json").read_text())
        names = {entry["site"]["name"] for entry in config["quantization_config"]["sites"]}
        assert "blocks.0.attn1.qkv" in names
        with safe_open(next((folder / part).glob("*.safetensors")), "pt") as file:
            assert "blocks.0.attn1.qkv.qweight" in file.keys()  # noqa: SIM118
    pipe = dirotq.load(folder, device="cpu")
    assert list(denoisers_of(pipe)) == list(EXPERTS)
    networks = denoisers_of(pipe).values()
    layers = [sum(isinstance(m, QuantLinear) for m in one.modules()) for one in networks]
    assert layers == [len(read_plan(made["rank"].file("plan.json"))) // 2] * 2

    def video():
        call = json.loads((folder / "generation.json").read_text())
        noise = torch.Generator().manual_seed(0)
        return pipe("a star", generator=noise, output_type="pt", **call).frames

    want = video()
    for one in denoisers_of(pipe).values():
        dirotq.accelerate(one, compile=False, graphs=False)
        cpu = torch.device("cpu")
        one.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    torch.testing.assert_close(video(), want, rtol=0, atol=1e-5)
    pipe = dirotq.load(folder, device="cpu")
    pipe.save_pretrained(tmp_path / "again")
    again = (tmp_path / "again" / "README.md").read_text()
    assert "transformer_2" in again
    torch.testing.assert_close(
        dirotq.load(tmp_path / "again", device="cpu").transformer_2.state_dict(),
        pipe.transformer_2.state_dict(),
    )


def test_the_expert_at_work_counts_and_the_other_waits(made):
    folder = made["pack"].tree("model")
    told = of_folder(folder)
    sizes = [told.weights[part] for part in EXPERTS]
    model, group = (told.phases(Way(kind)) for kind in ("model", "group"))
    assert model["denoise"] == pytest.approx(CONTEXT + max(sizes) + told.denoising)
    assert group["denoise"] < model["denoise"]
    resident = told.phases(Way("none", graphs=True))
    idle = resident["decode"] - told.phases(Way("none"))["decode"]
    assert idle == pytest.approx(2 * told.denoising)  # each keeps a graph

    pipe = dirotq.load(folder, device="cpu")
    call = json.loads((folder / "generation.json").read_text())

    def video():
        noise = torch.Generator().manual_seed(0)
        return pipe("a star", generator=noise, output_type="pt", **call).frames

    want = video()
    place(pipe, torch.device("cpu"), "model")
    before = pipe.transformer_2._hf_hook.prev_module_hook  # who leaves when this one comes
    assert before.model is pipe.transformer
    assert torch.equal(video(), want)


def test_one_report_has_a_section_of_each(made):
    report = json.loads(made["validate"].file("report.json").read_text())
    assert list(report["denoisers"]) == list(EXPERTS)
    assert sum(d["bytes"] for d in report["denoisers"].values()) == report["bytes"]["total"]
    assert report["metrics"]["sqnr_db"] > 10
    assert report["metrics"]["psnr"] > 20
    page = made["validate"].file("report.html").read_text()
    for part in EXPERTS:
        assert f"<h3>{part}</h3>" in page


def test_the_worst_sites_are_found_among_both(experts):
    rank = run(experts("rank.sensitive={count: 3, keep: 16}", "until=rank"))["rank"]
    kept = json.loads(rank.file("kept.json").read_text())
    assert len([why for why in kept.values() if "measured error" in why]) == 3
    plan = read_plan(rank.file("plan.json"))
    assert {e.site.name.partition(".")[0] for e in plan} == set(EXPERTS)


def test_a_budget_is_compared_in_both(experts):
    chosen = ("rank=budget", "rank.like=16", "rank.gate=2", "until=rank")
    rest = [setting for setting in LINE if not setting.startswith("rank.")]
    rank = run(experts(*chosen, line=rest))["rank"]
    assert rank.metrics["gate_psnr"] > 10


def test_passes_of_few_calls_add_up(experts, made, monkeypatch, tmp_path):
    monkeypatch.setattr(Replay, "make_room", lambda *_: 2)
    again = Captured(run(experts("until=capture", f"store={tmp_path}"))["capture"])
    want = Captured(made["capture"])
    for entry in read_plan(made["rank"].file("plan.json")):
        s_DD, w_DD = (moment(c.stored_moment(entry.site), "cpu") for c in (again, want))
        torch.testing.assert_close(s_DD, w_DD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"transformer_2": [None, None]}, "names no transformer_2, the expert of low noise"),
        ({"boundary_ratio": None}, "names a transformer_2 but no boundary_ratio"),
    ],
)
def test_an_index_that_lacks_half_of_the_experts_is_refused(own, packed, values, said):
    for folder in (own, packed):
        edit(folder, **values)
    with pytest.raises(ConfigError, match=said):
        DiffusersModel(path=str(own), call={}).folder()
    with pytest.raises(ArtifactError, match=said):
        dirotq.load(packed, device="cpu", verify=False)


def test_a_missing_expert_is_named(own, packed):
    for folder in (own, packed):
        shutil.rmtree(folder / "transformer_2")
    with pytest.raises(ConfigError, match="the transformer_2 is listed"):
        DiffusersModel(path=str(own), call={}).folder()
    with pytest.raises(ArtifactError, match="transformer_2"):
        dirotq.load(packed, device="cpu")
    with pytest.raises(ArtifactError, match="the transformer_2 is listed"):
        dirotq.load(packed, device="cpu", verify=False)


def test_experts_of_different_depth(loaded):
    kinds = [list(map(type, one.modules())) for one in denoisers_of(loaded).values()]
    first, second = (kind.count(QuantLinear) for kind in kinds)
    assert 2 * (second - 1) == 3 * (first - 1)  # seven sites a block, one before them


def test_a_lora_is_held_against_the_expert_that_it_is_for(loaded):
    """Of the block that the other one lacks."""
    layer = "transformer.blocks.2.attn1.to_q"
    lora = {
        f"{layer}.lora_A.weight": torch.ones(4, 64),
        f"{layer}.lora_B.weight": torch.ones(64, 4),
    }
    with pytest.raises(ConfigError, match=r"blocks\.2\.attn1\.to_q \(no such module\)"):
        loaded.load_lora_weights(lora, adapter_name="low")
    loaded.load_lora_weights(lora, adapter_name="low", load_into_transformer_2=True)
    assert loaded.get_list_adapters() == {"transformer_2": ["low"]}


def test_a_run_that_is_killed_between_experts_goes_on(experts, made, tmp_path, monkeypatch):
    monkeypatch.setattr("dirotq.pipeline.units.LOOK", -1)
    capture, wrote, right = stage(experts(), "capture"), [], replayed_moments.write_moment

    def killed(group, name, *args, **kwargs):
        if name.startswith("transformer_2."):
            raise KeyboardInterrupt
        right(group, name, *args, **kwargs)

    def noted(group, name, *args, **kwargs):
        wrote.append(name)
        right(group, name, *args, **kwargs)

    monkeypatch.setattr(replayed_moments, "write_moment", killed)
    with pytest.raises(KeyboardInterrupt):
        run_stage(capture, tmp_path)
    monkeypatch.setattr(replayed_moments, "write_moment", noted)
    run_stage(capture, tmp_path)
    again = [name for name in wrote if not name.startswith("transformer_2.")]
    assert again == ["transformer.condition_embedder.time_proj"]  # one unit with the other's
    got, want = tree_bytes(tmp_path), tree_bytes(made["capture"].data)
    assert got.items() >= {name: want[name] for name in want if name.startswith("moments")}.items()


def test_one_expert_taken_out_leaves_a_model_of_one(own):
    shutil.rmtree(own / "transformer_2")
    edit(own, transformer_2=[None, None], boundary_ratio=None)
    with pytest.raises(ConfigError, match=r"guidance_scale_2=3\.0 .* names no boundary_ratio"):
        DiffusersModel(path=str(own), call={}).check()
    model = DiffusersModel(path=str(own), call={"guidance_scale_2": None})
    model.check()
    assert model.prefixes == ("",)


def test_the_second_expert_alone_has_to_have_the_name_of_the_first(own):
    shutil.rmtree(own / "transformer")
    edit(own, transformer=[None, None])
    with pytest.raises(ConfigError, match=r"Call its transformer_2 so, .*a boundary_ratio of null"):
        DiffusersModel(path=str(own), call={}).folder()
    edit(own, boundary_ratio=None)
    with pytest.raises(ConfigError, match=r"Call its transformer_2 so, .*as folder$"):
        DiffusersModel(path=str(own), call={}).folder()


def test_an_expert_without_a_step_is_refused(experts, tmp_path):
    one_step = ("+model.call.num_inference_steps=1", f"store={tmp_path}", "until=capture")
    with pytest.raises(ConfigError, match=r"one of transformer_2, .* called transformer at all"):
        run(experts(*one_step))


def test_what_is_for_one_transformer_is_refused_for_two(own, packed, tmp_path):
    lora = tmp_path / "lora.safetensors"
    lora.write_bytes(b"")
    with pytest.raises(UnsupportedError, match="denoises with transformer and transformer_2"):
        DiffusersModel(path=str(own), call={}, lora=str(lora)).folder(weights=False)
    with pytest.raises(UnsupportedError, match="an export holds one transformer"):
        export(packed, "convrot_w4a4", out=tmp_path / "x.safetensors")
