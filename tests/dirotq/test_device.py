import pytest
import torch

from dirotq.device import compute_dtype, pick_device
from dirotq.errors import ConfigError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_cpu_computes_in_float32_and_cuda_in_bfloat16():
    assert compute_dtype(pick_device("cpu")) == torch.float32
    assert compute_dtype(torch.device("cuda:1")) == torch.bfloat16


@no_cuda
def test_auto_takes_the_cpu_where_there_is_nothing_else():
    assert pick_device("auto") == torch.device("cpu")


@no_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_missing_gpu_is_an_error_and_not_a_slow_run(name):
    with pytest.raises(ConfigError, match=rf"device={name}, but .* no CUDA device.*device=cpu"):
        pick_device(name)
