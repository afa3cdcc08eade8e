"""Packed networks without hooks, each made once per module (tests/support/tiny_offload.py)."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny_offload import call, network
from torch import Tensor


@pytest.fixture(scope="module")
def plain_network() -> Callable[[str], tuple[Any, Tensor]]:
    """name -> its network and what that computes, each made once."""
    made: dict[str, Any] = {}

    def of(name: str) -> tuple[Any, Tensor]:
        if name not in made:
            plain = network(name)
            made[name] = plain, call(plain, name)
        return made[name]

    return of
