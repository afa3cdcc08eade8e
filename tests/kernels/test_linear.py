import copy

import pytest
import torch
from tiny_packed import packed
from tiny_spec import FP4, tiny_spec
from torch import nn

from dirotq.kernels.formats.quantize_weight import dequantize_weight, unpack_weight
from dirotq.kernels.linear import QuantLinear, SiteView, buffer_shapes
from dirotq.kernels.transform_quantize import quantize_rows, transform

SPECS = {
    "token": tiny_spec(),
    "pow2-protected": tiny_spec(rank=8, block=16, act_scale="pow2"),
    "groups": tiny_spec(rank=8, block=64, weight_scale="group", act_scale="group"),
    "w4a8": tiny_spec(rank=8, block=16, act_bits=8),
    "dense": tiny_spec(rank=16, transform="dense"),
    "w4a16": tiny_spec(act_bits=16, weight_scale="group"),
    "w4a16-protected": tiny_spec(act_bits=16, rank=8, block=16),
    "nvfp4": tiny_spec(**FP4["nvfp4"], rank=8),
    "mxfp4": tiny_spec(**FP4["mxfp4"], rank=8, block=64),
    "mxfp4-dense": tiny_spec(**FP4["mxfp4"], rank=8, transform="dense"),
    "w4a16-nvfp4": tiny_spec(weight_scale="nvfp4", act_bits=16),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def in_full_precision(module: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    """The same linear without rounding activations, float64."""
    basis, rotation = (b if b is None else b.double() for b in (module.basis, module.rotation))
    z, c = transform(x.double(), basis, rotation, module.spec)
    unpacked = unpack_weight(module.qweight, module.wscale, module.wglobal)
    weight = dequantize_weight(*unpacked, torch.float64)
    y = z @ weight.T + module.bias.double()
    return y if c is None else y + c @ module.wp.double().T


@every_spec
def test_close_to_the_unrounded_linear(spec):
    module = packed(spec)
    x = torch.randn(40, 64)
    want = in_full_precision(module, x)
    error = (module(x) - want).norm() / want.norm()
    assert error < {4: 0.2, 8: 0.01, 16: 1e-5}[spec.activations.bits]
    if spec.activations.bits == 4:
        assert error > 0.005  # really four bits


@every_spec
def test_rows_are_slices_of_the_whole(spec):
    module, x = packed(spec), torch.randn(3, 7, 64)
    whole = module(x)
    for rows in (slice(0, 16), slice(16, 48), slice(5, 6)):
        torch.testing.assert_close(module(x, rows=rows), whole[..., rows], rtol=1e-5, atol=1e-5)


@every_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_follow_the_input(spec, dtype):
    y = packed(spec)(torch.randn(2, 3, 5, 64, dtype=dtype))
    assert y.shape == (2, 3, 5, 48)
    assert y.dtype == dtype
    assert y.isfinite().all()


@every_spec
@pytest.mark.parametrize("bias", [False, True])
def test_buffers_have_the_declared_shapes(spec, bias):
    module = QuantLinear(spec, bias=bias, device="meta")
    declared = {n: s for n, s in buffer_shapes(spec, bias=bias).items() if s is not None}
    assert {n: tuple(b.shape) for n, b in module.named_parameters()} == declared
    fp4 = spec.weights.element == "e2m1"
    bytes_ = {n for n, b in module.named_parameters() if b.dtype == torch.uint8}
    assert bytes_ == ({"qweight", "wscale"} if fp4 else {"qweight"})
    assert ("wglobal" in declared) == (spec.weights.name == "nvfp4")
    assert module.wglobal is None or module.wglobal.dtype == torch.float32
    assert ("bias" in declared) == bias
    assert ("basis" in declared) == ("wp" in declared) == (spec.rank > 0)
    assert ("rotation" in declared) == (spec.transform.kind == "dense")
    assert set(module.state_dict()) == set(declared)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.float16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.float32),
    ],
    ids=["to", "half", "double", "device-and-dtype"],
)
def test_casting_a_model_leaves_packed_buffers_alone(cast):
    model = nn.Sequential(nn.Linear(64, 64), packed(SPECS["pow2-protected"]))
    before = {n: b.clone() for n, b in model[1].named_parameters()}
    cast(model)
    for name, buffer in model[1].named_parameters():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name]), name


def test_moving_a_model_moves_packed_buffers():
    module = packed(SPECS["pow2-protected"]).to("meta", torch.float16)
    assert {b.device.type for b in module.parameters()} == {"meta"}
    assert module.basis.dtype == torch.bfloat16


class Shared(nn.Module):
    """Two consumers of one site."""

    def __init__(self) -> None:
        super().__init__()
        self.site = packed(tiny_spec(rows=(16, 32), rank=8, block=16))
        self.first = SiteView(self.site, slice(0, 16))
        self.second = SiteView(self.site, slice(16, 48))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.first(x), self.second(x)], -1)


def test_views_together_are_the_site():
    model, x = Shared(), torch.randn(4, 64)
    torch.testing.assert_close(model(x), model.site(x), rtol=1e-5, atol=1e-5)


def test_a_shared_site_is_stored_once():
    names = set(Shared().state_dict())
    assert names == {f"site.{b}" for b in ("qweight", "wscale", "basis", "wp", "bias")}


def test_a_deep_copy_reads_its_own_site():
    model, x = Shared(), torch.randn(4, 64)
    before = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    twin.site.wscale.mul_(2)
    assert not torch.allclose(twin(x), before)
    assert torch.equal(model(x), before)
    assert twin.first.site is twin.site


def test_repr_says_what_it_is():
    model = Shared()
    assert "64 -> [16, 32], W4A4, r=8, hadamard" in repr(model.site)
    assert "rows 16:48 of the site" in repr(model.second)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 60), r"x has 60 channels \(3, 60\); this linear takes 64"),
        (torch.zeros(3, 64, dtype=torch.int8), "x is torch.int8; use bfloat16, float16 or float32"),
        (torch.zeros(3, 64, device="meta"), "x is on meta, the packed weights are on cpu; move"),
    ],
    ids=["channels", "dtype", "device"],
)
def test_wrong_inputs_are_refused(x, message):
    module = packed(SPECS["pow2-protected"])
    for call in (module, lambda x: module(x, rows=slice(0, 16))):
        with pytest.raises(ValueError, match=message):
            call(x)


@pytest.mark.parametrize(
    ("dim", "outputs", "share"),
    [(3072, 9216, 0.29), (3072, 21504, 0.29), (3072, 3072, 0.30), (12288, 3072, 0.29)],
)
def test_memory_at_rest(dim, outputs, share):
    """Bytes of all buffers against the bf16 weight's, at 64 protected directions."""
    spec = tiny_spec(dim=dim, rows=(outputs,), rank=64, block=256)
    module = QuantLinear(spec, bias=True, device="meta")
    held = sum(b.numel() * b.element_size() for b in module.parameters())
    assert held <= share * 2 * dim * outputs


def test_a_shared_sites_plan_counts_the_outputs_of_all():
    module = packed(SPECS["token"])
    assert module.plan(5).engine == "reference"
    assert module.plan(5, torch.float16).why == "the kernels need an NVIDIA GPU"


def test_nan_stays_in_its_row():
    module, x = packed(SPECS["pow2-protected"]), torch.randn(4, 64)
    want = module(x)
    x[2, 5] = torch.nan
    got = module(x)
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3]], want[[0, 1, 3]])


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_stored_bytes_are_what_the_linear_computes_with(name):
    """From nibbles and scale bytes to numbers by hand; then every byte counts."""
    module = packed(SPECS[name], bias=False)
    low, high = module.qweight & 0xF, module.qweight >> 4
    elements = E2M1[torch.stack([low, high], -1).flatten(-2).long()]
    if name == "nvfp4":
        scale = module.wscale.view(torch.float8_e4m3fn).double() * module.wglobal.double()
    else:
        scale = 2.0 ** (module.wscale.double() - 127)
    weight = elements * scale.repeat_interleave(64 // scale.shape[1], 1)
    x = torch.randn(7, 64)
    z, c = transform(x, module.basis, module.rotation, module.spec)
    codes, step = quantize_rows(z, module.spec)
    want = (
        dequantize_weight(codes, step, torch.float64) @ weight.T + c.double() @ module.wp.double().T
    )
    torch.testing.assert_close(module(x).double(), want, rtol=1e-5, atol=1e-5)
    before = module(x)
    module.wscale[3, 1] += 1
    changed = (module(x) != before).any(0)
    assert changed[3]
    assert not changed[[0, 1, 2, *range(4, 48)]].any()


def test_the_global_scale_scales_everything():
    module = packed(tiny_spec(**FP4["nvfp4"]), bias=False)
    x = torch.randn(7, 64)
    before = module(x)
    module.wglobal *= 2
    assert torch.equal(module(x), 2 * before)
