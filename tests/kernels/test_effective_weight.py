import pytest
import torch
from tiny_packed import packed
from tiny_spec import FP4, tiny_spec

from dirotq.kernels.effective_weight import effective_weight

SPECS = {
    "plain": {},
    "low rank": {"rank": 8, "block": 16},
    "regular": {"rank": 8, "block": 16, "transform": "regular"},
    "dense": {"rank": 8, "transform": "dense"},
    "smooth": {"rank": 8, "branch": "beside", "smooth": True, "block": 16},
    "beside": {"rank": 8, "branch": "beside"},
    "groups": {"weight_scale": "group"},
    "levels": {"weight_scale": "lm4_channel", "rank": 8, "block": 16},
    "groups of levels": {"weight_scale": "lm4_group"},
    "nvfp4": FP4["nvfp4"] | {"rank": 8},
    "mxfp4": FP4["mxfp4"],
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_map_of_a_linear_that_rounds_no_activation(name, bias):
    fields = SPECS[name] | {"act_bits": 16, "act_scale": "token"}
    linear = packed(tiny_spec(**fields), bias=bias)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    weight = effective_weight(linear.packed(), linear.spec)
    assert weight.dtype == torch.float32 and weight.shape == (48, 64)
    want = linear(x)
    got = torch.nn.functional.linear(
        x, weight, None if linear.bias is None else linear.bias.float()
    )
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * want.abs().max())
