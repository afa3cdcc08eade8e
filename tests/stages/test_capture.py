import dataclasses
import re

import pytest
import torch
import zarr
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_line import run_stage, stage, tree_bytes
from torch import Tensor

from dirotq.errors import ConfigError, NumericalError
from dirotq.models.call import load_calls
from dirotq.quantize import replayed_moments
from dirotq.quantize.moments import moment, read_stored
from dirotq.quantize.tensors import read_array
from dirotq.sources.generation import generate
from dirotq.sources.model import DiffusersModel
from dirotq.stages import capture as module

pytestmark = pytest.mark.usefixtures("looks_every_time")

ROWS = 64


@pytest.fixture(scope="session")
def capture(line):
    """The configured stage: six prompts in three shards, two of three calls recorded."""
    return stage(line(), "capture")


@pytest.fixture(scope="module")
def whole(capture, tmp_path_factory):
    """What an undisturbed run of it writes; to be read only."""
    folder = tmp_path_factory.mktemp("whole")
    run_stage(capture, folder)
    return folder


@pytest.fixture(scope="module")
def seen(capture):
    """What it has to have seen."""
    return activations(capture)


def activations(stage: module.Capture) -> dict[str, list[Tensor]]:
    """What plain hooks see: per site, one [tokens, D] tensor per recorded call."""
    pipe = stage.model.pipeline(torch.float32, torch.device("cpu"))
    sites, prompts = stage.model.sites(), stage.prompts.load()
    now: dict[str, list[Tensor]] = {}
    for site in sites:
        pipe.transformer.get_submodule(site.linears[-1]).register_forward_pre_hook(
            lambda _, args, site=site: now[site.name].append(args[0].reshape(-1, site.in_features))
        )
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    shards = [prompts[i : i + stage.batch] for i in range(0, len(prompts), stage.batch)]
    for shard, batch in enumerate(shards):
        now.update({site.name: [] for site in sites})
        generate(pipe, batch, stage.model.call_arguments(), output="latent")
        chosen = module.chosen_calls(shard, len(shards), 3, -(-stage.calls // stage.batch))
        for name, calls in now.items():
            assert len(calls) == 3
            seen[name] += [calls[i] for i in chosen]
    return seen


@pytest.mark.parametrize("calls", [6, 18, 1000])
def test_moments_are_the_mean_of_outer_products(capture, calls, tmp_path):
    capture = dataclasses.replace(capture, calls=calls)
    metrics = run_stage(capture, tmp_path)
    group = zarr.open_group(tmp_path / "moments.zarr", mode="r")
    seen = {name: torch.cat(x).double() for name, x in activations(capture).items()}
    assert set(group.array_keys()) == set(seen)
    for name, x in seen.items():
        got = moment(read_stored(group, name), "cpu")
        assert got.dtype == torch.float32
        assert group[name].attrs["tokens"] == len(x)
        want = x.T @ x / len(x)
        assert (got - want).norm() < 1e-5 * want.norm(), name
    assert metrics["tokens"] == max(map(len, seen.values()))
    assert (metrics["prompts"], metrics["calls"]) == (6, min(calls, 18))


def test_a_site_of_few_rows_is_kept_as_its_rows(capture, whole):
    group = zarr.open_group(whole / "moments.zarr", mode="r")
    forms = {site.name: group[site.name].attrs["form"] for site in capture.model.sites()}
    few = {
        s.name: group[s.name].attrs["tokens"] <= s.in_features // 2 for s in capture.model.sites()
    }
    assert forms == {name: "rows" if few[name] else "triangle" for name in forms}
    assert {name for name, is_few in few.items() if is_few} >= {n for n in forms if "norm" in n}


def test_rows_are_rows_that_were_seen_evenly_from_every_call(whole, seen):
    group = zarr.open_group(whole / "rows.zarr", mode="r")
    for name, calls in seen.items():
        rows = read_array(group, name)
        assert rows.dtype == torch.bfloat16
        assert len(rows) == ROWS
        share = [ROWS * (i + 1) // len(calls) - ROWS * i // len(calls) for i in range(len(calls))]
        for got, want in zip(rows.split(share), calls, strict=True):
            # Computed twice, values may differ by an ulp and round to another bf16.
            apart = torch.cdist(got.double(), want.double()).amin(1)
            assert (apart < 0.005 * got.double().norm(dim=1)).all(), name


def test_rows_tell_their_timesteps(capture, whole):
    """Three steps, of which a shard records two: each row's is its call's, in the rows' order."""
    group = zarr.open_group(whole / "rows.zarr", mode="r")
    told = {tuple(group[site.name].attrs["timesteps"]) for site in capture.model.sites()}
    (rows,) = told
    assert len(rows) == ROWS
    pipe = capture.model.pipeline(torch.float32, torch.device("cpu"))
    generate(pipe, capture.prompts.load()[:1], capture.model.call_arguments(), output="latent")
    steps = (pipe.scheduler.timesteps / 1000).tolist()
    calls = [steps[i] for shard in range(3) for i in module.chosen_calls(shard, 3, 3, 6)]
    share = [ROWS * (i + 1) // len(calls) - ROWS * i // len(calls) for i in range(len(calls))]
    want = [t for t, count in zip(calls, share, strict=True) for _ in range(count)]
    assert rows == pytest.approx(want, abs=1e-5)


def test_absmax_is_the_largest_magnitude_of_each_channel(whole, seen):
    group = zarr.open_group(whole / "peaks.zarr", mode="r")
    for name, calls in seen.items():
        want = torch.cat(calls).abs().amax(0)
        torch.testing.assert_close(read_array(group, name), want, rtol=1e-5, atol=1e-6)


def test_calls_that_do_not_fit_go_in_several_passes(capture, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(replayed_moments.Replay, "make_room", lambda *_: 4)
    run_stage(capture, tmp_path / "several")
    one, several = (
        zarr.open_group(folder / "moments.zarr", mode="r")
        for folder in (whole, tmp_path / "several")
    )
    for site in capture.model.sites():
        assert one[site.name].attrs["tokens"] == several[site.name].attrs["tokens"]
        want = moment(read_stored(one, site.name), "cpu")
        assert (
            moment(read_stored(several, site.name), "cpu") - want
        ).norm() < 1e-5 * want.norm(), site.name
        absmax = [
            read_array(zarr.open_group(folder / "peaks.zarr", mode="r"), site.name)
            for folder in (whole, tmp_path / "several")
        ]
        torch.testing.assert_close(*absmax, rtol=1e-5, atol=1e-6)
    rows = zarr.open_group(tmp_path / "several" / "rows.zarr", mode="r")
    assert all(bool(read_array(rows, s.name).any(1).all()) for s in capture.model.sites())
    for folder in (whole, tmp_path / "several"):
        group = zarr.open_group(folder / "rows.zarr", mode="r")
        times = [group[site.name].attrs["timesteps"] for site in capture.model.sites()]
        assert [len(set(one)) for one in times] == [3] * len(times)
        assert [len(one) for one in times] == [ROWS] * len(times)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 500))
def test_chosen_calls_are_distinct_and_as_many_as_wanted(shards, made, wanted):
    chosen = [module.chosen_calls(shard, shards, made, wanted) for shard in range(shards)]
    for calls in chosen:
        assert len(set(calls)) == len(calls) and all(0 <= call < made for call in calls)
    # Shards differ by at most one, unless one is asked for more than it made.
    lengths = {len(calls) for calls in chosen}
    assert max(lengths) - min(lengths) <= 1
    assert sum(map(len, chosen)) == min(wanted, made * shards) or max(lengths) == made


def test_chosen_calls_cover_all_timesteps_and_both_branches_of_guidance():
    chosen = [c for shard in range(64) for c in module.chosen_calls(shard, 64, 56, 256)]
    counts = torch.bincount(torch.tensor(chosen), minlength=56)
    assert counts.min() >= 3 and counts.max() <= 6  # 4.6 on average
    assert abs(sum(c % 2 for c in chosen) - 128) <= 16


def test_the_probes_are_calls_of_the_denoiser_at_different_timesteps(capture, whole):
    probe, *others = load_calls(whole, ["probe"])
    assert len(others) == module.PROBES - 1
    assert len({float(call.kwargs["timestep"][0]) for call in (probe, *others)}) > 1
    transformer = capture.model.pipeline(torch.float32, torch.device("cpu")).transformer
    with torch.no_grad():
        out = transformer(*probe.args, **probe.kwargs, return_dict=False)[0]
    assert out.shape == probe.kwargs["hidden_states"].shape
    assert out.isfinite().all()


def test_two_runs_write_the_same_bytes(capture, whole, tmp_path):
    run_stage(capture, tmp_path)
    assert tree_bytes(tmp_path) == tree_bytes(whole)


def test_an_interrupted_recording_goes_on_at_the_next_shard(capture, whole, tmp_path, monkeypatch):
    shards = []
    record = module.Trajectories.record

    def counted(self, shard, choose):
        if len(shards) == 1 and not (tmp_path / "power is back").exists():
            raise KeyboardInterrupt
        shards.append(shard[0].seed)
        return record(self, shard, choose)

    monkeypatch.setattr(module.Trajectories, "record", counted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(capture, tmp_path / "resumed")
    (tmp_path / "power is back").touch()
    run_stage(capture, tmp_path / "resumed")
    assert shards == [100, 102, 104]  # none twice
    assert tree_bytes(tmp_path / "resumed") == tree_bytes(whole)


def test_an_interrupted_replay_goes_on_at_the_next_block(capture, whole, tmp_path, monkeypatch):
    written = []
    write = replayed_moments.write_moment

    def counted(group, name, *args, **kwargs):
        if len(written) == 10 and not (tmp_path / "power is back").exists():
            raise KeyboardInterrupt
        written.append(name)
        write(group, name, *args, **kwargs)

    monkeypatch.setattr(replayed_moments, "write_moment", counted)
    with pytest.raises(KeyboardInterrupt):
        run_stage(capture, tmp_path / "resumed")
    (tmp_path / "power is back").touch()
    run_stage(capture, tmp_path / "resumed")
    double = [name for name in written if name.startswith("transformer_blocks")]
    assert len(double) == len(set(double))  # the finished block is not recorded again
    assert tree_bytes(tmp_path / "resumed") == tree_bytes(whole)


@pytest.mark.parametrize(("before", "after"), [(4, 4), (4, 100), (100, 4)])
def test_an_interrupted_replay_counts_no_call_twice_however_passes_fall(
    capture, tmp_path, monkeypatch, before, after
):
    monkeypatch.setattr(replayed_moments.Replay, "make_room", lambda *_: after)
    run_stage(capture, tmp_path / "undisturbed")
    write, written = replayed_moments.write_moment, []

    def interrupted(group, name, *args, **kwargs):
        if len(written) == 14:  # in the second pass's first block, if there are several
            raise KeyboardInterrupt
        written.append(name)
        write(group, name, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(replayed_moments.Replay, "make_room", lambda *_: before)
        patch.setattr(replayed_moments, "write_moment", interrupted)
        if before == 100:
            written += ["a site"] * 3
        with pytest.raises(KeyboardInterrupt):
            run_stage(capture, tmp_path / "resumed")
    run_stage(capture, tmp_path / "resumed")
    if before <= after:
        assert tree_bytes(tmp_path / "resumed") == tree_bytes(tmp_path / "undisturbed")
    # A block that one pass finished keeps that pass's sums, and rows that were drawn otherwise.
    want, got = (
        zarr.open_group(tmp_path / name / "moments.zarr") for name in ("undisturbed", "resumed")
    )
    for site in capture.model.sites():
        assert got[site.name].attrs["tokens"] == want[site.name].attrs["tokens"]
        pair = [moment(read_stored(group, site.name), "cpu") for group in (got, want)]
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6)


def test_a_site_that_saw_no_token_is_named(capture, tmp_path, monkeypatch):
    # A block that hands its inputs on without using them, as an expert without tokens does.
    def skip(self, hidden_states, encoder_hidden_states, **_):
        return encoder_hidden_states, hidden_states

    monkeypatch.setattr(FluxSingleTransformerBlock, "forward", skip)
    with pytest.raises(
        NumericalError, match=r"site single_transformer_blocks\.0.* saw no token \(3 such"
    ):
        run_stage(capture, tmp_path)


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


@pytest.mark.parametrize("field", ["batch", "calls", "rows"])
def test_settings_below_one_are_refused(capture, field):
    with pytest.raises(ConfigError, match=rf"capture\.{field}=0.*at least 1"):
        dataclasses.replace(capture, **{field: 0})
