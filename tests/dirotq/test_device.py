import os

import psutil
import pytest
import torch

from dirotq.device import ALLOCATOR, compute_dtype, expandable_segments, give_back, pick_device
from dirotq.errors import ConfigError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_cpu_computes_in_float32_and_cuda_in_bfloat16():
    assert compute_dtype(pick_device("cpu")) == torch.float32
    assert compute_dtype(torch.device("cuda:1")) == torch.bfloat16


def test_memory_that_is_free_goes_back_to_the_system():
    """Of tensors below 32 MB, between which something is still held: glibc alone keeps their
    memory.
    """
    process, each = psutil.Process(), 1 << 20
    torch.empty(24 << 20, dtype=torch.uint8)  # from then on glibc keeps what is smaller
    held = [torch.ones(each, dtype=torch.uint8) for _ in range(200)]
    full = process.memory_info().rss
    del held[:-1]
    give_back(torch.device("cpu"))
    assert full - process.memory_info().rss > 150 * each


@no_cuda
def test_auto_takes_the_cpu_where_there_is_nothing_else():
    assert pick_device("auto") == torch.device("cpu")


@no_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_missing_gpu_is_an_error_and_not_a_slow_run(name):
    with pytest.raises(ConfigError, match=rf"device={name}, but .* no CUDA device.*device=cpu"):
        pick_device(name)


@pytest.fixture
def unset(monkeypatch):
    for name in ALLOCATOR:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_segments_grow_unless_it_is_too_late(unset, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not expandable_segments() and not set(ALLOCATOR) & set(os.environ)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert expandable_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize("name", ALLOCATOR)
def test_what_the_environment_says_of_the_allocator_stays(unset, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:64")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert expandable_segments()
    assert [os.environ.get(n) for n in ALLOCATOR].count("max_split_size_mb:64") == 1
