"""What holds for every test: no network, no store of ours, threads that do not fight each other."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported. Threads on busy cores run many times slower than one thread.
_threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(os.cpu_count() or 1, 4)
os.environ.setdefault("OMP_NUM_THREADS", str(_threads))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def store_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifact store of this test; nothing may write to the checkout's."""
    root = tmp_path / "store"
    monkeypatch.setenv("DIROTQ_STORE", str(root))
    return root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu where torch finds no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
