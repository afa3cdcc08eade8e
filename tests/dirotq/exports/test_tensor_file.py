import pytest
import torch
from safetensors import safe_open

from dirotq.exports.tensor_file import write_tensors

TENSORS = {
    "a": torch.arange(3, dtype=torch.uint8),
    "b": torch.tensor(0.5),
    "c": torch.randn(5, 3).bfloat16(),
    "d": torch.randn(1, 1).to(torch.float8_e4m3fn),
    "e": torch.zeros(0, 4, dtype=torch.int8),
    "f": torch.randn(3, 4).mT,
}
SIGNATURES = {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()}


def test_safetensors_reads_it(tmp_path):
    file = tmp_path / "x.safetensors"
    size = write_tensors(file, SIGNATURES, reversed(TENSORS.items()), {"format": "pt", "k": "v"})
    assert size == file.stat().st_size
    with safe_open(file, "pt") as stored:
        assert stored.metadata() == {"format": "pt", "k": "v"}
        for name, tensor in TENSORS.items():
            found = stored.get_tensor(name)
            assert found.dtype == tensor.dtype
            assert torch.equal(found.float(), tensor.float()), name


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path):
    def broken():
        yield "a", TENSORS["a"]
        raise OSError("no space left")

    (tmp_path / "x.safetensors").write_text("the old one")
    with pytest.raises(OSError, match="no space"):
        write_tensors(tmp_path / "x.safetensors", SIGNATURES, broken(), {})
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_text() == "the old one"
