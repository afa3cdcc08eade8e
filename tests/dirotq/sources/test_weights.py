import json
import math

import pytest
import torch

from dirotq.errors import ArtifactError, UnsupportedError
from dirotq.sources.weights import (
    INDEX,
    WHOLE,
    is_finite,
    plan_shards,
    read_header,
    refuse_quantized,
    warn_of_zero,
    write_index,
)

SIZES = {"a": 3, "b": 3, "c": 9, "d": 1}


@pytest.mark.parametrize(
    ("limit", "groups"),
    [
        (16, [["a", "b", "c", "d"]]),
        (15, [["a", "b", "c"], ["d"]]),
        (6, [["c"], ["a", "b"], ["d"]]),  # one above the limit has a file of its own
        (5, [["a"], ["c"], ["b", "d"]]),
    ],
)
def test_no_file_is_above_the_limit_unless_one_tensor_is(limit, groups):
    assert list(plan_shards(SIZES, limit).filename_to_tensors.values()) == groups


def test_one_file_needs_no_index(tmp_path):
    plan = plan_shards(SIZES, 16)
    assert list(plan.filename_to_tensors) == [WHOLE]
    write_index(tmp_path, plan)
    assert not list(tmp_path.iterdir())


def test_several_files_are_found_through_the_index(tmp_path):
    plan = plan_shards(SIZES, 15)
    write_index(tmp_path, plan)
    one, two = (f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 16},
        "weight_map": {"a": one, "b": one, "c": one, "d": two},
    }


def test_a_pointer_of_git_lfs_is_no_damage(tmp_path):
    file = tmp_path / WHOLE
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n")
    with pytest.raises(ArtifactError, match="is a pointer of Git LFS, not the weights"):
        read_header(file)
    file.write_text("<html>404</html>")
    with pytest.raises(ArtifactError, match="is damaged"):
        read_header(file)


def test_complex_numbers_are_no_weights():
    refuse_quantized({"a.weight": ("F64", (1,))}, "x")
    with pytest.raises(UnsupportedError, match=r"x: a\.weight is stored as complex numbers \(C64"):
        refuse_quantized({"a.weight": ("C64", (1,))}, "x")


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2],
)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_in_many_that_is_not_finite(dtype, value):
    tensor = torch.ones(3, 1000).to(dtype)
    assert is_finite(tensor)
    if dtype.itemsize > 1:
        assert is_finite(torch.full((7,), torch.finfo(dtype).max, dtype=dtype))
    tensor[2, 777] = value
    assert not is_finite(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_matrix_of_zeros_is_named_and_nothing_else(dtype, caplog):
    almost = torch.zeros(4, 5)
    almost[3, 4] = 1
    fine = {"norm.bias": torch.zeros(5), "none.weight": torch.zeros(0, 5), "almost": almost}
    assert not warn_of_zero({name: t.to(dtype) for name, t in fine.items()}, "a file")
    assert not caplog.records
    assert warn_of_zero({"to_q.weight": torch.zeros(4, 5).to(dtype)}, "a file")
    assert "a file: to_q.weight is all zeros" in caplog.text


@pytest.mark.parametrize("tensor", [torch.ones(0, 3), torch.tensor(1.0), torch.ones(3).long()])
def test_nothing_and_whole_numbers_are_finite(tensor):
    assert is_finite(tensor)
