import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dirotq.packed.half import Lost

bits = st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=40)


@given(bits)
def test_every_stored_number_comes_back_through_float16(found):
    stored = torch.tensor(found, dtype=torch.int16).view(torch.bfloat16)
    stored = stored[~stored.isnan()]
    loaded = stored.half()
    lost = Lost.of(stored)
    for cast in (torch.float16, torch.float32):
        back = lost.put_back(loaded.to(cast))
        assert torch.equal(back.view(torch.int16), stored.view(torch.int16))


def test_what_float16_holds_costs_nothing():
    assert not len(Lost.of(torch.arange(-50, 50).bfloat16()).places)


def test_what_was_changed_stays_changed():
    stored = torch.tensor([[1.0, 2.0**-30], [1e9, 3e-7]]).bfloat16()
    lost = Lost.of(stored)
    assert lost.places.tolist() == [1, 2, 3]
    changed = stored.half()
    changed[0, 1] = 5
    assert lost.put_back(changed)[0, 1] == 5
    assert torch.equal(lost.put_back(changed)[1], stored[1])


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_any_shape(shape):
    stored = torch.full(shape, 1e-9).bfloat16()
    assert torch.equal(Lost.of(stored).put_back(stored.half()), stored)
