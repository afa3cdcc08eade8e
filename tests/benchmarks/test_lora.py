"""`benchmarks/lora.py` on a CPU: its adapters, and what it says without a GPU."""

import pytest
import tiny_offload
import torch

from dirotq.benchmarks import lora
from dirotq.packed.guards import guard


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lora.main([]) == 1
    assert "a CUDA GPU" in capsys.readouterr().err


def test_adapters_on_every_packed_linear():
    pytest.importorskip("peft")
    network = tiny_offload.network("flux")
    guard(network)
    lora.add(network, 3)
    found = lora.layers(network)
    assert len(found) == 14 + 6  # a double block, a single one, with their modulators
    want = tiny_offload.call(network, "flux")
    assert lora.directions(network) == "3 to 12 directions, 13 of 13 sites apart"
    lora.share(network)
    tiny_offload.call(network, "flux")
    assert lora.directions(network) == "3 to 3 directions, 13 of 13 sites apart"
    assert not torch.equal(tiny_offload.call(network, "flux"), want)
