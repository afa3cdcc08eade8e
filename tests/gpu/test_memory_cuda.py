"""torch's allocator as `dirotq.load(vram=...)` asks for it, in a process of its own."""

import os
import subprocess
import sys

import pytest

from dirotq.device import ALLOCATOR

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
LOOK = """
import torch
from dirotq.device import expandable_segments
if {late}:
    torch.empty(1, device="cuda")
print(expandable_segments())
torch.empty(1, device="cuda")
print(torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"])
"""


@pytest.mark.parametrize("late", [False, True])
def test_segments_grow_where_it_is_not_too_late(late):
    env = {name: value for name, value in os.environ.items() if name not in ALLOCATOR}
    done = subprocess.run(
        [sys.executable, "-c", LOOK.format(late=late)],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == (["False", "False"] if late else ["True", "True"])
