import dataclasses
import re

import pytest
import torch
import zarr
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from safetensors.torch import load_file, save_file
from tiny_line import run_stage, stage, tree_bytes
from torch import Tensor

from dirotq.errors import ConfigError, NumericalError
from dirotq.models.source import DiffusersModel, generate
from dirotq.stages import capture as module
from dirotq.tensors import read_array

ROWS = 64


@pytest.fixture(scope="session")
def capture(line):
    """The configured stage: six prompts in three shards, every second call recorded."""
    return stage(line(), "capture")


def activations(stage: module.Capture) -> dict[str, list[list[Tensor]]]:
    """What plain hooks see: per site and shard, one [tokens, D] tensor per recorded call."""
    pipe = stage.model.pipeline(torch.float32, torch.device("cpu"))
    sites, prompts = stage.model.sites(), stage.prompts.load()
    now: dict[str, list[Tensor]] = {}
    for site in sites:
        pipe.transformer.get_submodule(site.consumers[-1]).register_forward_pre_hook(
            lambda _, args, site=site: now[site.name].append(args[0].reshape(-1, site.dim))
        )
    seen: dict[str, list[list[Tensor]]] = {site.name: [] for site in sites}
    for shard, start in enumerate(range(0, len(prompts), stage.batch)):
        now.update({site.name: [] for site in sites})
        batch = prompts[start : start + stage.batch]
        generate(pipe, batch, stage.model.call_arguments(), output="latent")
        for name, calls in now.items():
            assert len(calls) == 3
            seen[name].append([x for i, x in enumerate(calls) if (i + shard) % stage.every == 0])
    return seen


def distinct(rows: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row.tolist()) for row in rows.to(torch.bfloat16)}


@pytest.mark.parametrize("every", [1, 2])
def test_moments_are_the_mean_of_outer_products(capture, every, tmp_path):
    capture = dataclasses.replace(capture, every=every)
    metrics = run_stage(capture, tmp_path)
    group = zarr.open_group(tmp_path / "moments.zarr", mode="r")
    seen = {
        name: torch.cat([x for shard in shards for x in shard]).double()
        for name, shards in activations(capture).items()
    }
    assert set(group.array_keys()) == set(seen)
    for name, x in seen.items():
        got = read_array(group, name)
        assert got.dtype == torch.float32
        assert group[name].attrs["tokens"] == len(x)
        want = x.T @ x / len(x)
        assert (got - want).norm() < 1e-5 * want.norm(), name
    assert metrics["tokens"] == max(map(len, seen.values()))
    assert metrics["prompts"] == 6


def test_rows_are_rows_that_were_seen_in_their_shard(capture, tmp_path):
    run_stage(capture, tmp_path)
    group = zarr.open_group(tmp_path / "rows.zarr", mode="r")
    for name, shards in activations(capture).items():
        rows = read_array(group, name)
        assert rows.dtype == torch.bfloat16
        quota = len(rows) // len(shards)
        assert ROWS <= len(rows) < ROWS + len(shards)
        for got, seen in zip(rows.split(quota), shards, strict=True):
            known = distinct(torch.cat(seen))
            assert distinct(got) <= known, name
            # Each row once while there are enough of them; a modulator's few are repeated.
            assert len(distinct(got)) == min(quota, len(known)), name


def test_rows_come_from_every_recorded_call(capture, tmp_path):
    capture = dataclasses.replace(capture, batch=6, every=1, rows=60)
    run_stage(capture, tmp_path)
    site = "transformer_blocks.0.attn.qkv"
    rows = read_array(zarr.open_group(tmp_path / "rows.zarr", mode="r"), site)
    (calls,) = activations(capture)[site]
    hits = [len(distinct(rows) & distinct(call)) for call in calls]
    assert sum(hits) == 60
    assert min(hits) >= 8  # 20 of each are expected


def test_the_probe_is_one_call_of_the_denoiser(capture, tmp_path):
    run_stage(capture, tmp_path)
    probe = load_file(tmp_path / "probe.safetensors")
    transformer = capture.model.transformer(torch.float32)
    with torch.no_grad():
        out = transformer(**probe, return_dict=False)[0]
    assert out.shape == probe["hidden_states"].shape
    assert out.isfinite().all()


def test_two_runs_write_the_same_bytes(capture, tmp_path):
    for name in ("a", "b"):
        run_stage(capture, tmp_path / name)
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


@pytest.mark.parametrize("finished_shards", [1, 2])
def test_an_interrupted_run_goes_on_where_it_stopped(
    capture, tmp_path, monkeypatch, finished_shards
):
    run_stage(capture, tmp_path / "undisturbed")
    shards = []

    def counted(pipe, prompts, *args, **kwargs):
        if len(shards) == finished_shards and not (tmp_path / "power is back").exists():
            raise KeyboardInterrupt
        shards.append(prompts[0].seed)
        return generate(pipe, prompts, *args, **kwargs)

    monkeypatch.setattr(module, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(capture, tmp_path / "resumed")
    (tmp_path / "power is back").touch()
    run_stage(capture, tmp_path / "resumed")
    assert shards == [100, 102, 104]  # none twice
    assert tree_bytes(tmp_path / "resumed") == tree_bytes(tmp_path / "undisturbed")


def test_a_site_that_saw_no_token_is_named(capture, tmp_path, monkeypatch):
    # A block that hands its inputs on without using them, as an expert without tokens does.
    def skip(self, hidden_states, encoder_hidden_states, **_):
        return encoder_hidden_states, hidden_states

    monkeypatch.setattr(FluxSingleTransformerBlock, "forward", skip)
    with pytest.raises(
        NumericalError, match=r"site single_transformer_blocks\.0.* saw no token \(3 such"
    ):
        run_stage(capture, tmp_path)
    assert not (tmp_path / "moments.zarr").exists()


def test_every_shard_records_a_call_however_few_steps_there_are(capture, tmp_path):
    run_stage(dataclasses.replace(capture, every=50), tmp_path)
    group = zarr.open_group(tmp_path / "rows.zarr", mode="r")
    for name in group.array_keys():
        rows = read_array(group, name)
        assert all(shard.any() for shard in rows.split(len(rows) // 3)), name


@pytest.mark.parametrize(
    ("weight", "site"),
    [
        ("transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_out.0"),
        ("single_transformer_blocks.0.proj_mlp.weight", "single_transformer_blocks.0.proj_out"),
        ("context_embedder.weight", "transformer_blocks.0."),
    ],
)
def test_activations_that_are_not_finite_name_their_first_site(
    capture, own_folder, tmp_path, weight, site
):
    (file,) = (own_folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors[weight][3, 5] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    broken = dataclasses.replace(capture, model=DiffusersModel(path=str(own_folder), call={}))
    with pytest.raises(NumericalError, match=f"site {re.escape(site)}.* not finite"):
        run_stage(broken, tmp_path / "out")
    assert not (tmp_path / "out" / "moments.zarr").exists()


@pytest.mark.parametrize("field", ["batch", "every", "rows"])
def test_settings_below_one_are_refused(capture, field):
    with pytest.raises(ConfigError, match=rf"capture\.{field}=0.*at least 1"):
        dataclasses.replace(capture, **{field: 0})
