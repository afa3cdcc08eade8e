"""diffusers' own test mixins on packed tiny pipelines: ``make test-diffusers DIFFUSERS=CHECKOUT``.

The checkout is the user's; nothing of it is copied. Where there is no GPU, the CPU stands in the
accelerator's place: tests that "require an accelerator" are told that there is one.
"""

import importlib
import os
import sys
from pathlib import Path

CHECKOUT = os.environ.get("DIFFUSERS_CHECKOUT")
SUPPORT = Path(__file__).parent.parent / "support"

if CHECKOUT is None:
    collect_ignore_glob = ["test_*.py"]
else:
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Ours lies in a folder of the same name.
    sys.path.insert(0, CHECKOUT)
    for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
        del sys.modules[name]
    theirs = importlib.import_module("tests.testing_utils")
    if theirs.torch_device == "cpu":
        for switch in ("require_accelerator", "require_torch_accelerator"):
            setattr(theirs, switch, lambda test: test)
