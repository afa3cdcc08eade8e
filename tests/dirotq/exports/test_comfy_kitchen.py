"""comfy-kitchen, which ComfyUI multiplies with, reads the files: its eager backend, on a CPU."""

import pytest
import torch
from exported import MODULATORS, NATIVE, ExportedFile
from tiny_line import run

import dirotq
from dirotq.kernels.engine import reference
from dirotq.kernels.formats.quantize_weight import dequantize_weight, unpack_weight
from dirotq.kernels.linear import QuantLinear

pytest.importorskip(
    "comfy_kitchen", reason="comfy-kitchen is not installed: pip install comfy-kitchen"
)

CASES = {
    "convrot_w4a4": ("method=convrot", "weight_format=int4_channel", "act_format=int4_token"),
    "svdquant_w4a4": ("method=absorb",),
    "comfy_nvfp4": ("method=rtn_nvfp4",),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request, line, tmp_path_factory):
    packed = run(line(*CASES[request.param], "until=pack"))["pack"]
    file = tmp_path_factory.mktemp("kitchen") / "tiny.safetensors"
    dirotq.export(packed.path, request.param, out=file)
    transformer = dirotq.load(packed.path, device="cpu").transformer
    sites = {n: m for n, m in transformer.named_modules() if isinstance(m, QuantLinear)}
    return ExportedFile(file), sites


def test_codes_and_outputs(exported):
    from comfy_kitchen.backends.eager import awq, convrot_w4a4, quantization, svdquant

    file, sites = exported
    for native, name in (NATIVE | MODULATORS).items():
        linear = sites[name]
        t, record = file.layer(native), file.record(native)
        torch.manual_seed(0)
        x = torch.randn(48, linear.spec.in_features)
        codes, steps = unpack_weight(linear.qweight, linear.wscale, linear.wglobal)
        weight = dequantize_weight(codes, steps)
        ours = reference(x, linear.packed(), linear.spec)
        floats = {n: v.float() for n, v in t.items() if v.is_floating_point()}
        if record["format"] == "convrot_w4a4":
            assert torch.equal(convrot_w4a4.prepare_int4_weight_for_int8_linear(t["weight"]), codes)
            y = convrot_w4a4.convrot_w4a4_linear(
                x, t["weight"], t["weight_scale"], floats["bias"], record["convrot_groupsize"]
            )
        elif record["format"] == "svdquant_w4a4":
            assert torch.equal(svdquant._unpack_int4_row_major(t["weight"]), codes)
            acts, scales, c = svdquant.quantize_svdquant_w4a4(
                x, floats["smooth_factor"], floats["proj_down"]
            )
            y = svdquant.scaled_mm_svdquant_w4a4(
                acts, t["weight"], scales, floats["weight_scale"], c, floats["proj_up"],
                floats["bias"],
            )[: len(x)]  # fmt: skip
        elif record["format"] == "awq_w4a16":
            assert torch.equal(awq._unpack_uint4_row_major(t["weight"]) - 8, codes)
            y = awq.gemv_awq_w4a16(
                x, t["weight"], floats["weight_scale"], floats["weight_zeros"], floats["bias"],
                record["group_size"],
            )  # fmt: skip
        else:
            found = quantization.dequantize_nvfp4(
                t["weight"], t["weight_scale_2"], t["weight_scale"], torch.float32
            )
            torch.testing.assert_close(found, weight, rtol=1e-6, atol=0)
            continue  # its product needs a matrix unit
        assert float((y - ours).norm() / ours.norm()) < 1e-3, native
