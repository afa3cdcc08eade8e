import pytest
from tiny_families import TINY

from dirotq.models.skeleton import empty_transformer


@pytest.mark.parametrize("name", TINY)
def test_without_buffers_it_has_the_same_names_and_shapes(name):
    """The classes without a table: tests/models/test_every_class.py."""
    network = TINY[name].build()
    config, cls = dict(network.config), type(network)
    bare = empty_transformer(config, cls, buffers=False)
    want = {name: tensor.shape for name, tensor in network.state_dict().items()}
    assert {name: tensor.shape for name, tensor in bare.state_dict().items()} == want
    assert all(buffer.is_meta for buffer in bare.buffers())
    whole = empty_transformer(config, cls)
    assert all(parameter.is_meta for parameter in whole.parameters())
    assert {n for n, b in whole.named_buffers() if b.is_meta} == set()
