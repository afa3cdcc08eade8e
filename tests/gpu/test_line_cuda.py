"""The line on CUDA: every stage runs there, and one packed folder means the same everywhere."""

import math

import pytest
import torch
import zarr
from safetensors.torch import load_file
from tiny_line import CALL, CAPTIONS, METHODS, run, stage
from torch import Tensor, nn

import dirotq
from dirotq.kernels import ops
from dirotq.kernels.linear import QuantLinear
from dirotq.kernels.plan import Plan
from dirotq.models.call import Call, load_calls
from dirotq.models.family import Site
from dirotq.pipeline.build import build
from dirotq.pipeline.config import compose_config
from dirotq.quantize.plan import read_plan
from dirotq.quantize.tensors import load_site, read_array, site_file
from dirotq.sources.generation import generate
from dirotq.stages.fuse import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32")]


@pytest.fixture(scope="module")
def on_cuda(line, tiny_root):
    """The default line's artifacts, all computed on CUDA in a store of their own."""
    return run(line("device=cuda", f"store={tiny_root / 'cuda'}"))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_on_cuda(line, tiny_root, name):
    artifacts = run(line(f"method={name}", "device=cuda", f"store={tiny_root / 'cuda'}"))
    assert list(artifacts) == [
        "capture",
        "basis",
        "rank",
        "gptq",
        "fuse",
        "pack",
        "reference",
        "validate",
    ]
    metrics = artifacts["validate"].metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["psnr"] > 25
    assert artifacts["fuse"].metrics["network_error"] < 1e-4
    for artifact in artifacts.values():
        artifact.check()


def test_devices_share_fingerprints(finished, on_cuda):
    assert {n: a.fingerprint for n, a in on_cuda.items()} == {
        n: a.fingerprint for n, a in finished.items()
    }


# One call agrees at every site (next test but one), so neither attention nor the sums are to blame;
# over the sampled steps image tokens come to differ by 0.4 on an H200, text tokens by 0.01, with
# equal traces. The trained model's moments lead to the same quality on both devices.
@pytest.mark.xfail(strict=False, reason="image tokens drift apart over the steps of a random model")
def test_moments_agree(finished, on_cuda, capsys):
    # CUDA captures in bf16, the CPU in float32.
    cpu, cuda = (
        zarr.open_group(a["capture"].tree("moments.zarr"), mode="r") for a in (finished, on_cuda)
    )
    found = {n: differences(read_array(cuda, n), read_array(cpu, n)) for n in cpu.array_keys()}
    tokens = {n: (dict(cpu[n].attrs), dict(cuda[n].attrs)) for n in found}
    with capsys.disabled():
        print(
            "\nsecond moments, CUDA bf16 against CPU float32: error; of the diagonal; trace ratio"
        )
        for name, row in sorted(found.items(), key=lambda item: -item[1][0]):
            print(f"  {name:45}", *(f"{value:8.4f}" for value in row), *tokens[name])
    assert all(ours == theirs for ours, theirs in tokens.values()), tokens
    assert max(row[0] for row in found.values()) < 0.1


def differences(got: Tensor, want: Tensor) -> tuple[float, float, float]:
    """Relative error of a moment, the same of its diagonal, ratio of the traces."""
    diagonals = got.diagonal(), want.diagonal()
    return (
        relative_error(got, want),
        relative_error(*diagonals),
        float(diagonals[0].sum() / diagonals[1].sum()),
    )


@torch.no_grad()
def site_inputs(transformer: nn.Module, sites: list[Site], probe: Call) -> dict[str, Tensor]:
    """What every site reads in one call with ``probe``, float64 on the CPU."""
    found: dict[str, Tensor] = {}
    hooks = [
        transformer.get_submodule(site.linears[0]).register_forward_pre_hook(
            lambda _, args, name=site.name: found.__setitem__(name, args[0].double().cpu())
        )
        for site in sites
    ]
    first = next(transformer.parameters())
    call = probe.map(
        lambda t: t.to(first.device, first.dtype if t.is_floating_point() else t.dtype)
    )
    with torch.no_grad():
        transformer(*call.args, **call.kwargs | {"return_dict": False})
    for hook in hooks:
        hook.remove()
    return found


def test_one_call_of_the_sixteen_bit_network_agrees(line, finished, capsys):
    """Site by site, CUDA errs no more than twice what the CPU does in the same dtype."""
    model = stage(line(), "capture").model
    sites = model.sites()
    probe, *_ = load_calls(finished["capture"].data, ["probe"])

    def run_on(device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        return site_inputs(model.pipeline(dtype, torch.device(device)).transformer, sites, probe)

    want = run_on("cpu", torch.float64)
    runs = {
        (device, dtype): run_on(device, dtype)
        for device in ("cpu", "cuda")
        for dtype in (torch.float32, torch.bfloat16)
    }
    errors = {key: {n: relative_error(got[n], want[n]) for n in want} for key, got in runs.items()}
    with capsys.disabled():
        print("\ninputs of the sites against float64:", *(f"{d} {t}" for d, t in errors), sep="  ")
        for name in want:
            print(f"  {name:45}", *(f"{e[name]:.1e}" for e in errors.values()))
    for dtype in (torch.float32, torch.bfloat16):
        cpu, cuda = errors["cpu", dtype], errors["cuda", dtype]
        # In float32 the sines of the time embedding decide: their arguments reach 1000.
        floor = torch.finfo(dtype).eps * (1000 if dtype == torch.float32 else 1)
        bad = {n: (cuda[n], cpu[n]) for n in want if cuda[n] > 2 * cpu[n] + floor}
        assert bad == {}, f"{dtype}: (CUDA, CPU) {bad}"


def test_quantized_weights_are_as_good(finished, on_cuda):
    plans = [read_plan(a["rank"].file("plan.json")) for a in (finished, on_cuda)]
    assert [e.spec for e in plans[0]] == [e.spec for e in plans[1]]
    for entry in plans[0]:
        file = f"sites/{site_file(entry.site.name)}"
        cpu, cuda = (load_site(a["gptq"].file(file))["loss"][0] for a in (finished, on_cuda))
        assert float(cuda) < 1.5 * float(cpu) + 1e-6, entry.site.name


def test_packed_tensors_have_the_same_names_and_shapes(finished, on_cuda):
    cpu, cuda = (
        load_file(a["pack"].tree("model") / "transformer/diffusion_pytorch_model.safetensors")
        for a in (finished, on_cuda)
    )
    assert {n: (t.shape, t.dtype) for n, t in cpu.items()} == {
        n: (t.shape, t.dtype) for n, t in cuda.items()
    }


@pytest.mark.parametrize("name", METHODS)
def test_one_folder_means_the_same_on_both_devices(line, name):
    artifacts = run(line(f"method={name}"))
    probe, *_ = load_calls(artifacts["capture"].data, ["probe"])
    outputs = []
    for device in ("cpu", "cuda"):
        pipe = dirotq.load(artifacts["pack"].path, device=device, dtype=torch.float32)
        call = probe.on(torch.device(device), torch.float32)
        with torch.no_grad():
            out = pipe.transformer(*call.args, **call.kwargs | {"return_dict": False})
        outputs.append(out[0].cpu())
    # A code at a tie may fall to the other side: a step of 4 bits, here and there.
    assert relative_error(outputs[1], outputs[0]) < 0.02


def test_images_in_bf16(finished):
    pipe = dirotq.load(finished["pack"].path, device="cuda")
    noise = torch.Generator("cpu").manual_seed(1)
    image = pipe(CAPTIONS[0], generator=noise, output_type="pt", **CALL).images
    assert image.device.type == "cuda"
    assert image.isfinite().all()


@pytest.fixture(scope="module")
def trained(tiny_root):
    """The embedded model, packed on CUDA from a few prompts: its line and its artifacts."""
    built = build(
        compose_config(
            [
                "model=tiny_flux",
                "prompts.calibration.count=32",
                "prompts.heldout.count=8",
                "capture.batch=8",
                "validate.batch=8",
                "validate.pairs=0",
                "device=cuda",
                f"store={tiny_root / 'trained'}",
            ],
            "dirotq.conf",
        )
    )
    return built, run(built)


def test_the_trained_model_draws_the_same_images(trained, monkeypatch, capsys):
    """Packed, in bf16 on CUDA, against float32 on a CPU: no farther than bf16 itself goes."""
    built, artifacts = trained
    judge = stage(built, "validate")
    prompts, call = judge.prompts.load(), judge.model.call_arguments()
    folder = artifacts["pack"].path

    def images(pipe) -> Tensor:
        return generate(pipe, prompts, call)

    original = images(judge.model.pipeline(torch.float32, torch.device("cpu")))
    in_bf16 = images(judge.model.pipeline(torch.bfloat16, torch.device("cuda")))
    specified = images(dirotq.load(folder, device="cpu"))
    pipe = dirotq.load(folder, device="cuda")
    linears = [m for m in pipe.transformer.modules() if isinstance(m, QuantLinear)]
    assert linears and all(m.plan(64).engine != "reference" for m in linears)
    by_kernels = images(pipe)
    plain = Plan(engine="reference", container="none")
    monkeypatch.setattr(ops, "choose", lambda *_: plain)
    by_torch = images(dirotq.load(folder, device="cuda"))

    def apart(a: Tensor, b: Tensor) -> float:
        return float((a - b).square().mean().sqrt())

    pairs = {
        "bf16 on CUDA - float32 on CPU, both 16-bit models": (in_bf16, original),
        "packed, CPU float32 - 16-bit model": (specified, original),
        "packed, CUDA kernels - 16-bit model": (by_kernels, original),
        "packed, CUDA kernels - packed, CPU float32": (by_kernels, specified),
        "packed, CUDA plain torch bf16 - packed, CPU float32": (by_torch, specified),
    }
    rms = {name: apart(*pair) for name, pair in pairs.items()}
    with capsys.disabled():
        print()
        for name, value in rms.items():
            print(f"  {name:52} PSNR {-20 * math.log10(max(value, 1e-9)):.2f} dB")
    noise, wanted, got, kernels, torchs = rms.values()
    assert got <= wanted + noise
    assert kernels <= 2 * torchs
