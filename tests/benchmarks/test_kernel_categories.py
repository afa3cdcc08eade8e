"""Kernels by name, and the time of a trace."""

import pytest

from dirotq.benchmarks.kernel_categories import GAPS, Kernel, busy, by_category, category, longest


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("nvjet_qqtst_128x256_128x4_2x1_v_bz_coopB_bias_TNT", "GEMM"),
        ("void cutlass::device_kernel<enable_3x_kernel_for_sm9x<GemmUniversal>>", "GEMM"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "GEMM"),
        ("tma_kernel", "GEMM"),
        ("unpacked_kernel", "GEMM"),
        ("packed_kernel", "GEMM"),
        ("unpack", "unpack"),
        ("project", "transform, quantize"),
        ("rotate", "transform, quantize"),
        ("round_rows", "transform, quantize"),
        ("norm_modulate_quantize", "transform, quantize"),
        ("one_row", "modulators"),
        ("norm_rope", "rope"),
        ("forward", "attention"),
        ("dots", "modulators"),
        ("triton_red_fused_cat_quant_linear_scaled_dot_product_1", "norms, elementwise"),
        ("void at::native::vectorized_layer_norm_kernel<float>", "norms, elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>",
         "norms, elementwise"),
        ("void at::native::CatArrayBatchedCopy<OpaqueType<2u>>", "norms, elementwise"),
        ("triton_poi_fused_add_mul_3", "norms, elementwise"),
        ("Memcpy DtoD (Device -> Device)", "norms, elementwise"),
        ("something_else", "other"),
    ],
)  # fmt: skip
def test_categories(kernel, wanted):
    assert category(kernel) == wanted


def test_two_streams_count_once():
    kernels = [Kernel("rotate", 0, 10), Kernel("unpack", 5, 12), Kernel("unpack", 20, 21)]
    assert busy(kernels) == 13
    assert busy([]) == 0


def test_gaps_are_what_no_kernel_fills():
    kernels = [Kernel("rotate", 0, 10e3), Kernel("unpack", 5e3, 12e3), Kernel("gemm", 12e3, 20e3)]
    found = by_category(kernels, wall_ms=25.0)
    assert found == {"unpack": 7.0, "transform, quantize": 10.0, "GEMM": 8.0, GAPS: 5.0}
    assert by_category(kernels, wall_ms=19.0)[GAPS] == 0


def test_the_longest_kernels_first():
    kernels = [Kernel("a", 0, 1e3), Kernel("b", 1e3, 4e3), Kernel("a", 4e3, 5e3)]
    assert longest(kernels) == [("b", 3.0, 1), ("a", 2.0, 2)]
