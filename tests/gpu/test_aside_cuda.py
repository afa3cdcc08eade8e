"""Copies on a stream of their own don't wait for kernels that are queued, and lose no bytes."""

import pytest
import torch

from dirotq.calibrate.aside import Aside

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

BUSY = 2_000_000_000
"""Cycles of a kernel that does nothing: a second."""
CUDA = torch.device("cuda")


def test_a_copy_waits_for_what_was_queued_before_its_mark_alone():
    aside, numbers = Aside(CUDA), torch.arange(1 << 20, device=CUDA)
    numbers += 1
    here = aside.mark()
    torch.cuda._sleep(BUSY)
    with aside.after(here):
        host = numbers.cpu()
    assert not torch.cuda.current_stream().query()  # the kernel still runs
    assert torch.equal(host, torch.arange(1, (1 << 20) + 1))


def test_memory_is_not_given_away_while_kernels_that_read_it_are_queued():
    aside, size = Aside(CUDA), 1 << 20
    ones, zeros = torch.ones(size), torch.zeros(size)
    with aside.after(None):
        held = ones.to(CUDA)
    aside.hand_over([held])
    torch.cuda._sleep(BUSY)
    copy = held.clone()  # queued behind the kernel
    del held
    with aside.after(None):
        later = zeros.to(CUDA)
    assert copy.sum().item() == size and later.sum().item() == 0
