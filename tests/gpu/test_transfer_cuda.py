"""Copies through page-locked memory have the bytes of plain ones, beside queued kernels too."""

import pytest
import torch

from dirotq.calibrate.aside import Aside
from dirotq.transfer import SLAB, SMALL, download, upload

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda", 0)
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def noise(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(0, 2 if dtype is torch.bool else 100, (size,)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bytes_", [0, SMALL, SMALL + 8, SLAB, SLAB + 8, 5 * SLAB + 24])
def test_both_ways_keep_all_bytes(dtype, bytes_):
    host = noise(bytes_ // dtype.itemsize, dtype)
    there = upload(host, GPU)
    assert there.device == GPU and torch.equal(there, host.to(GPU))
    assert torch.equal(download(there), host)


def test_shapes_and_strides_do_not_matter():
    host = torch.randn(3000, 4000).T
    assert torch.equal(upload(host, "cuda").cpu(), host)
    assert torch.equal(download(host.to(GPU).T), host.T)
    one = torch.tensor(3.0)
    assert upload(one, GPU).shape == () and download(one.to(GPU)) == one


def test_many_copies_in_a_row_share_the_slabs():
    hosts = [noise(2 * SLAB + i, torch.uint8) for i in range(6)]
    for host, there in zip(hosts, [upload(host, GPU) for host in hosts], strict=True):
        assert torch.equal(there.cpu(), host)


def test_a_download_waits_for_the_kernels_of_its_stream_alone():
    x = torch.randn(4096, 4096, device=GPU)
    for _ in range(50):
        x = torch.nn.functional.normalize(x @ x)
    want = x.clone()
    aside = Aside(GPU)
    with aside.after(aside.mark()):
        found = download(want)
    assert torch.equal(found, want.cpu())
