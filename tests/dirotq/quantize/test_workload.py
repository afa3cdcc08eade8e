"""Shapes of published models on the meta device: no weights exist."""

from types import SimpleNamespace

import pytest
from hydra.utils import instantiate
from published_shapes import write_shapes
from tiny_pipelines import family_folder

from dirotq.models.family import Site
from dirotq.pipeline.config import compose_config
from dirotq.pipeline.machine import Machine
from dirotq.quantize import expected, memory, workload
from dirotq.quantize.drawing import with_site
from dirotq.quantize.running import Way, activations, latent_frames, pixels_per_token
from dirotq.quantize.workload import Workload


@pytest.fixture(autouse=True)
def only_shapes_count(monkeypatch):
    """The folders here hold the configurations of full-size models, and none of their weights."""
    monkeypatch.setattr("dirotq.sources.origin.refuse_incomplete", lambda *_, **__: None)


def of(folder, *overrides) -> Workload:
    cfg = compose_config([f"model={folder}", *overrides], "dirotq.conf")
    return instantiate(cfg.workload, _convert_="all")


@pytest.fixture
def flux(tmp_path) -> Workload:
    """FLUX.1-dev."""
    return of(write_shapes("flux", tmp_path))


def test_flux_is_as_large_as_published(flux):
    assert flux.image_tokens == 4096
    assert flux.guided == 1
    assert flux.parameters == pytest.approx(11.9e9, rel=0.01)
    assert flux.forward_flops == pytest.approx(74e12, rel=0.02)  # 174 ms on an H200
    assert flux.recorded == 512
    tokens = {flux.tokens(site) for site in flux.block_sites}
    assert tokens == {512, 4096, 4608}  # text, image, and both in the single-stream blocks
    assert flux.widest == 15360
    assert flux.channels == 3072


def test_flux_bytes(flux):
    one = next(site for site in flux.sites if site.in_features == 15360)
    assert flux.moment_bytes(one) == 60 * 61 // 2 * 256 * 256 * 4  # its tiles in float32
    modulator = next(site for site in flux.sites if site.kind == "modulator")
    assert flux.moment_bytes(modulator) == 2 * 512 * 3072  # its rows in bfloat16
    assert 4 < 8 * sum(flux.packed.values()) / flux.parameters < 5  # bits, everything counted
    assert flux.state == pytest.approx(33e6, rel=0.1)


def test_tiny_flux_and_its_guidance():
    tiny = of("tiny_flux")
    assert (tiny.image_tokens, tiny.text_tokens, tiny.guided) == (256, 48, 1)
    guided = of("tiny_flux", "+model.call.guidance_scale=4.0", "capture.batch=3")
    assert guided.guided == 2  # its transformer embeds none
    assert guided.samples == 6
    assert guided.recorded == 1024


def test_two_denoisers_are_told_apart(tiny_root):
    work = of(family_folder(tiny_root, "wan22"), "rank.r=8", "method.text_group=64")
    assert list(work.packed_parts) == ["transformer", "transformer_2"]
    assert sum(work.packed_parts.values()) == sum(work.packed.values())
    running = expected.packed(work)
    assert running.weights.items() >= work.packed_parts.items()
    first, second = (running.phases(Way(kind))["denoise"] for kind in ("none", "model"))
    assert first - second == sum(running.weights.values()) - max(work.packed_parts.values())


def test_two_denoisers_take_turns_where_there_is_no_room(tiny_root):
    work = of(family_folder(tiny_root, "wan22"), "rank.r=8", "method.text_group=64")
    assert work.largest_denoiser == work.parameters // 2
    recorded = SimpleNamespace(vram=None, rows=1)
    drawn = SimpleNamespace(batches={"original": 1}, dtype="auto")
    for told, stage in ((memory.capture, recorded), (memory.reference, drawn)):
        enough, tight = (
            told(stage, work, Machine(name="CPU", vram=0, ram=ram)).ram
            for ram in (10 * 4 * work.parameters, 4 * work.parameters)
        )
        assert enough > tight
    saved = memory.CPU_SLACK * 4 * work.largest_denoiser
    assert enough - tight == pytest.approx(saved)


def test_a_forward_is_of_one_of_two_denoisers(tiny_root):
    more = ("rank.r=8", "method.text_group=64")
    one, two = (of(family_folder(tiny_root, name), *more) for name in ("wan", "wan22"))
    assert two.forward_flops == one.forward_flops
    assert sum(map(two.share, two.sites)) == pytest.approx(sum(map(one.share, one.sites)))


def test_the_forecast_is_of_the_call_and_the_stages_of_the_sample(tiny_root):
    folder = family_folder(tiny_root, "wan22")
    more = ("rank.r=8", "method.text_group=64")
    call, small = of(folder, *more), of(folder, *more, "+model.sample.num_frames=1")
    assert (call.image_tokens, small.image_tokens) == (2 * 16, 16)
    assert small.notes == call.notes
    assert small.forward_flops < call.forward_flops == small.as_called.forward_flops
    assert Workload.alone(small.ranks).image_tokens == call.image_tokens
    stage, here = SimpleNamespace(batch=1, pairs=0, dtype="auto"), Machine(name="", vram=0, ram=1)
    assert memory.validate(stage, small, here).disk < memory.validate(stage, call, here).disk


def test_tokens_are_counted_by_what_an_autoencoder_says_of_itself(tiny_root):
    """LTX-2's and Wan 2.2 5B's shrink more than their levels tell."""
    assert latent_frames({"temporal_compression_ratio": 8}, 49) == 7
    assert latent_frames({"scale_factor_temporal": 4}, 25) == latent_frames({}, 25) == 7
    said = {"spatial_compression_ratio": 32, "block_out_channels": [8] * 4}
    assert pixels_per_token({"patch_size": 1, "in_channels": 1}, said) == 32
    wan5b = {"scale_factor_spatial": 16, "dim_mult": [1, 2, 4, 4]}
    assert pixels_per_token({"patch_size": [1, 2, 2]}, wan5b) == 32


def test_branches_of_guidance_may_be_calls_of_their_own(tiny_root):
    work = of(family_folder(tiny_root, "wan22"), "rank.r=8", "method.text_group=64")
    assert (work.guided, work.doubled, work.samples) == (2, 1, work.batch)
    guided, scale = {"guidance_scale": 4.0}, {"true_cfg_scale": 4.0}
    wan, other = ({"_class_name": name} for name in ("WanTransformer3DModel", "Other"))
    one, two, true = (
        activations(config, {}, 64, call)["denoising"]
        for config, call in ((wan, guided), (other, guided), (other, guided | scale))
    )
    assert one == true == two / 2


def test_decoders_are_counted_in_the_precision_that_they_need(tiny_root, monkeypatch):
    monkeypatch.setattr(memory, "activations", lambda *_: 0)
    wan = of(family_folder(tiny_root, "wan22"), "rank.r=8", "method.text_group=64")
    assert memory._image_peak(wan, 3, 2) == memory._image_peak(wan, 3, 4)
    assert memory._image_peak(wan, 3, 2) == 3 * expected.packed(wan).decoding
    flux = of("tiny_flux")
    assert memory._image_peak(flux, 1, 4) == 2 * memory._image_peak(flux, 1, 2)


def test_two_packed_denoisers_are_both_there(tiny_root):
    folder = family_folder(tiny_root, "wan22")
    work = of(folder, "rank.r=8", "method.text_group=64")
    parts, codes = sum(work.packed_parts.values()), work.packed["codes"]
    numbers = sum(work.component_numbers.values())
    assert 0.9 < 2 * numbers / sum(work.components.values()) < 1  # without headers of files
    half, whole = (expected.packed(work, width=width) for width in (2, 4))
    assert sum(half.weights.values()) == parts + 2 * numbers
    assert sum(whole.weights.values()) == parts + 2 * numbers + parts - codes + 2 * numbers
    assert whole.denoising == 2 * half.denoising
    stage = SimpleNamespace(batch=1, pairs=0, dtype="auto")
    tight, enough = (Machine(name="CPU", vram=0, ram=ram) for ram in (1, 10**12))
    assert memory.validate(stage, work, tight) == memory.validate(stage, work, enough)


def test_packed_text_encoders_are_compared_in_the_16_bit_pipeline(tiny_root):
    folder = family_folder(tiny_root, "wan22")
    more = ("rank.r=8", "method.text_group=64")
    plain, packed = of(folder, *more), of(folder, *more, "text_encoders=w8")
    stage = SimpleNamespace(batch=1, pairs=0, dtype="auto")
    here = Machine(name="CPU", vram=0, ram=10**12)
    one, both = memory._draw_original(packed, here, stage, 1), memory.validate(stage, packed, here)
    alone = memory._draw(with_site(expected.packed(plain, 1, 4), plain.largest_weight), here)
    assert one[0] > alone[0]
    saved = memory.CPU_SLACK * (one[0] - alone[0])
    assert both.ram - memory.validate(stage, plain, here).ram == pytest.approx(saved)
    assert both.disk > 1.5 * memory.validate(stage, plain, here).disk


def test_text_of_models_without_a_table():
    def site(name):
        return Site(name, (name,), 64, (64,), "block", True)

    assert workload._reads_text(site("blocks.0.attn.add_q_proj"))
    assert workload._reads_text(site("blocks.0.ff_context.net.0.proj"))
    assert not workload._reads_text(site("blocks.0.attn.to_q"))
