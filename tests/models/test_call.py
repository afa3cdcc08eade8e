import pytest
import torch

from dirotq.errors import ArtifactError
from dirotq.models.call import Call, call_files, load_calls, load_probe, save_calls, timestep
from dirotq.pipeline.store import ArtifactStore

DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "gone": lambda path: path.unlink(),
    "other": lambda path: path.write_bytes(b'[{"args": {"tensor": "x"}, "kwargs": 5}]'),
    "list": lambda path: path.write_bytes(b'[{"args": ["tensor"]}]'),
}


def calls():
    x = torch.arange(6.0).reshape(2, 3)
    return [Call((x, [None, 2]), {"timestep": x[0].bfloat16(), "flags": {"a": True}})]


def same(a, b):
    assert [t.tolist() for t in a.tensors()] == [t.tolist() for t in b.tensors()]
    blank = lambda call: call.map(lambda tensor: torch.zeros(()).numpy().tolist())  # noqa: E731
    assert blank(a) == blank(b)


def test_calls_come_back_as_they_were(tmp_path):
    save_calls(tmp_path, "x", calls())
    [got] = load_calls(tmp_path, ["x"])
    same(got, calls()[0])
    assert sorted(tmp_path.iterdir()) == sorted(call_files(tmp_path, "x"))


class Denoiser(torch.nn.Module):
    def forward(self, x, timestep=None, guidance=None):
        return x


class Short(torch.nn.Module):
    def forward(self, x, t):
        return x


@pytest.mark.parametrize(
    ("model", "call", "want"),
    [
        (Denoiser(), Call((0, torch.tensor([0.5, 0.7])), {}), 0.6),
        (Denoiser(), Call((0,), {"timestep": torch.tensor(981)}), 981.0),
        (Denoiser(), Call((0,), {"timestep": 3}), 3.0),
        (Short(), Call((0, torch.tensor([0.25])), {}), 0.25),
        (Denoiser(), Call((0,), {}), None),
        (Denoiser(), Call((0,), {"timestep": torch.zeros(0)}), None),
        (Denoiser(), Call((0,), {"unknown": 1}), None),
    ],
)
def test_the_timestep_of_a_call(model, call, want):
    assert timestep(model, call) == (want if want is None else pytest.approx(want))


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_calls_are_named(tmp_path, part, damage):
    save_calls(tmp_path, "x", calls())
    DAMAGES[damage](call_files(tmp_path, "x")[part])
    with pytest.raises(ArtifactError, match=r"recorded calls .*x\.safetensors are damaged"):
        load_calls(tmp_path, ["x"])


@pytest.mark.parametrize("part", [0, 1])
def test_probe_calls_are_not_read_past_their_digests(store_root, part):
    with ArtifactStore(store_root).create("capture", {"made": "here"}) as draft:
        save_calls(draft.data, "probe", calls())
    same(load_probe(draft.artifact)[0], calls()[0])
    path = call_files(draft.artifact.data, "probe")[part]
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"probe\.\w+ changed after it was written"):
        load_probe(draft.artifact)
