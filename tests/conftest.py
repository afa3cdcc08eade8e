"""What holds for every test: no network, no store of ours, threads that do not fight each other.

Triton kernels run on the GPU where there is one, in Triton's interpreter where there is none.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Until all is imported: a third of that time went by looking for garbage among what stays.
gc.disable()

os.environ["HF_HUB_OFFLINE"] = "1"
# Before torch is imported. Threads on busy cores run many times slower than one thread.
_threads = 1 if "PYTEST_XDIST_WORKER" in os.environ else min(os.cpu_count() or 1, 4)
os.environ.setdefault("OMP_NUM_THREADS", str(_threads))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as dirotq/cli.py has it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis  # noqa: E402
import torch  # noqa: E402
from composed_once import composed_once  # noqa: E402

# An example that takes 200 ms says that the machine is busy, not that the code is wrong.
hypothesis.settings.register_profile("dirotq", deadline=None)
hypothesis.settings.load_profile("dirotq")

# Before triton is imported: kernels are bound to the compiler or the interpreter for good.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """What ``fsync`` is for, a power cut, no test can see; tests of its calls put their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def configurations_are_made_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        composed_once(patch.setattr)
        yield


@pytest.fixture(scope="module", autouse=True)
def what_a_module_leaves_is_not_looked_through() -> Iterator[None]:
    """Modules, caches and compiled code stay to the end: looking for garbage among them, again and
    again, was a tenth of the suite."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def store_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifact store of this test; nothing may write to the checkout's."""
    root = tmp_path / "store"
    monkeypatch.setenv("DIROTQ_STORE", str(root))
    return root


@pytest.fixture
def empty_is(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """``with empty_is(255):`` every byte of memory that torch hands out unwritten has that value.

    255 makes any float NaN. A kernel that leaves an element of its output out, or reads one that
    nobody wrote, shows it: as NaN, or as results that differ between two values.
    """

    def filled(allocate: Callable[..., torch.Tensor], byte: int) -> Callable[..., torch.Tensor]:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            new = allocate(*args, **kwargs)
            new.flatten().view(torch.uint8).fill_(byte)
            return new

        return empty

    @contextmanager
    def empty_is(byte: int) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", filled(torch.empty, byte))
            patch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty, byte))
            yield

    return empty_is


def pytest_collection_finish() -> None:
    """Look for garbage again, but not among what was imported."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest; skip tests marked gpu where torch finds no CUDA device."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
