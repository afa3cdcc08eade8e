"""When weights are unpacked on a second stream."""

from types import SimpleNamespace

import pytest
import torch

from dirotq.kernels.side_stream import WORTH, beside, fork

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "products", "capturing", "forks"),
    [
        (GPU, WORTH - 1, False, False),
        (GPU, WORTH, False, True),
        (GPU, 1, True, True),
        (torch.device("cpu"), WORTH, False, False),
    ],
)
def test_a_fork_for_large_products_and_in_graphs(device, products, capturing, forks, monkeypatch):
    stream = SimpleNamespace(record_event=lambda: "event")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert fork(device, products) == ("event" if forks else None)


def test_without_a_fork_it_runs_where_it_is():
    with beside(None):
        pass
