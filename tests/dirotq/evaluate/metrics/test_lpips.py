"""The package is not installed here (it needs torchvision): a stand-in with its interface is."""

import pytest
import torch
from safetensors.torch import save_file

from dirotq.errors import ConfigError
from dirotq.evaluate.metrics.lpips import Lpips

PACKAGE = """
import torch
from torch import nn

class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.slice1 = nn.Sequential()
        self.slice1.add_module("0", nn.Conv2d(3, 4, 3))
        self.slice2 = nn.Sequential()
        self.slice2.add_module("3", nn.Conv2d(4, 2, 3))

class LPIPS(nn.Module):
    def __init__(self, net, pnet_rand, verbose):
        super().__init__()
        assert net == "alex" and pnet_rand and not verbose
        self.net = Backbone()

    def forward(self, a, b):
        assert a.min() < 0
        see = lambda x: self.net.slice2(self.net.slice1(x))
        return (see(a) - see(b)).square().mean((1, 2, 3), keepdim=True)
"""


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "features.0.weight": torch.randn(4, 3, 3, 3),
        "features.0.bias": torch.randn(4),
        "features.3.weight": torch.randn(2, 4, 3, 3),
        "features.3.bias": torch.randn(2),
        "classifier.1.weight": torch.randn(5, 5),  # torchvision's whole network does as well
    }
    save_file(tensors, tmp_path / "alexnet.safetensors")
    return tmp_path / "alexnet.safetensors"


@pytest.fixture
def package(tmp_path, monkeypatch):
    import sys

    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "lpips.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    yield
    sys.modules.pop("lpips", None)


def test_distances_of_images_one_by_one(weights, package):
    metric = Lpips(path=str(weights), net="alex")
    metric.check()
    meter = metric.open(torch.device("cpu"))
    a, b = torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16)
    b[3] = a[3]
    meter.update(a[:3], ["x"] * 3, b[:3])
    meter.update(a[3:], ["x"], b[3:])
    first = meter.compute()
    assert len(first) == 4 and min(first[:3]) > 0 and first[3] == 0
    assert meter.compute() == []
    again = metric.open(torch.device("cpu"))  # its weights are the file's, nothing random is left
    again.update(a, ["x"] * 4, b)
    assert again.compute() == pytest.approx(first, abs=1e-6)


def test_weights_of_another_network(weights, package, tmp_path):
    save_file({"features.0.weight": torch.zeros(4, 3, 5, 5)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"has no features\.0\.\w+ of shape \(4"):
        Lpips(path=str(tmp_path / "other.safetensors"), net="alex").open(torch.device("cpu"))


def test_without_the_package(weights, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lpips needs the package lpips.*dirotq\[metrics\]"):
        Lpips(path=str(weights), net="alex").check()
    with pytest.raises(ConfigError, match=r"net=squeeze is unknown; use alex or vgg"):
        Lpips(path=str(weights), net="squeeze")


def test_identity_is_the_weights(weights, tmp_path):
    metric = Lpips(path=str(weights), net="alex")
    moved = weights.rename(tmp_path / "moved.safetensors")
    assert metric.net == "alex"
    before = Lpips(path=str(moved), net="alex").identity()
    save_file({"x": torch.zeros(1)}, moved)
    assert Lpips(path=str(moved), net="alex").identity() != before
