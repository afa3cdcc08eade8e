"""Kernels run in Triton's interpreter where there is no GPU, and take less time there."""

import os
from importlib.util import find_spec

if os.environ.get("TRITON_INTERPRET") and find_spec("triton"):
    import interpreter

    interpreter.install()
