import subprocess
import sys

import pytest

import dirotq


def fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_dirotq_loads_nothing_heavy():
    heavy = fresh(
        "import sys, dirotq, dirotq.pipeline.store, dirotq.errors\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'zarr'} & set(sys.modules)))"
    )
    assert heavy.strip() == "[]"


def test_the_command_line_starts_without_torch():
    loaded = fresh("import sys, dirotq.cli\nprint('torch' in sys.modules)")
    assert loaded.strip() == "False"


def test_lazy_names():
    assert callable(dirotq.compress)
    assert {"load", "compress"} <= set(dirotq.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = dirotq.nonsense


def test_what_is_listed_is_public():
    assert dir(dirotq) == sorted(dirotq.__all__)
    assert all(hasattr(dirotq, name) for name in dir(dirotq))
