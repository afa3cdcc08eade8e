"""What one process hands to the next about every block: the running sums of its sites.

Sums are made in the order of the calls, whoever makes them: a process begins a block with what the
one before it, whose calls come first, has summed up there. Messages are files in a folder of both,
so that nothing but the store has to be shared.

    relay.take("transformer_blocks.3", seen)  # begin with them
    relay.hand("transformer_blocks.3", seen)  # when the calls of this process have passed
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dirotq.models.family import Site
from dirotq.pipeline.divided import NotShared
from dirotq.transfer import download, upload

from .aside import Aside
from .recorder import Seen

POLL = 0.003
"""Seconds between two looks for a file."""
END = "end"


class Relay:
    """The place of process ``index`` among ``count`` of them, which meet in ``folder``.

    One that waits for another waits until it is killed: whoever started them knows who died.
    """

    def __init__(self, folder: Path, index: int, count: int, device: torch.device) -> None:
        self._device, self._aside = device, Aside(device)
        self._folder, self._index = folder, index
        self._first, self._last = index == 0, index == count - 1
        self._handed = self._taken = 0
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self._coming: Future[tuple[str, dict[str, Tensor]]] | None = None

    def __enter__(self) -> "Relay":
        if not self._last:
            self._file(self._index, 0).parent.mkdir(parents=True, exist_ok=True)
        self._read_on()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._pool.shutdown()

    def take(self, block: str, seen: Mapping[Site, Seen]) -> None:
        """Begin ``block`` with what the process before this one has seen in it.

        Raises NotShared if that one passed another block, or something was seen here before.
        """
        if self._coming is None:
            return
        found, tensors = self._coming.result()
        self._aside.hand_over(tensors.values())
        if found != block:
            raise NotShared(f"calls pass different blocks (one {found!r}, another {block!r})")
        if block != END:
            self._read_on()
        for site, one in seen.items():
            if f"{site.name}/tokens" in tensors:
                if one.tokens:
                    raise NotShared(f"site {site.name} is passed more than once")
                restore(one, site.name, tensors)

    def hand(self, block: str, seen: Mapping[Site, Seen]) -> None:
        """Hand on what was seen in ``block``, once the message before it was taken."""
        if self._last:
            return
        tensors = {n: download(t) for s, one in seen.items() for n, t in kept(one, s.name)}
        file = self._file(self._index, self._handed)
        if self._handed:
            self._until(self._file(self._index, self._handed - 1), there=False)
        partial = file.with_suffix(".partial")
        save_file(tensors, partial, metadata={"block": block})
        partial.replace(file)
        self._handed += 1

    def _read_on(self) -> None:
        if not self._first:
            self._coming = self._pool.submit(self._read, self._taken)
            self._taken += 1

    def _read(self, number: int) -> tuple[str, dict[str, Tensor]]:
        file = self._file(self._index - 1, number)
        self._until(file, there=True)
        with (
            self._aside.after(None),
            safe_open(file, framework="pt") as stored,
        ):
            block, tensors = stored.metadata()["block"], dict[str, Tensor]()
            for name in stored.keys():  # noqa: SIM118
                tensor = stored.get_tensor(name)
                # Whole numbers are read here; on a GPU each would be waited for.
                on = upload(tensor, self._device) if tensor.is_floating_point() else tensor.clone()
                tensors[name] = on
        file.unlink()
        return block, tensors

    def _until(self, file: Path, *, there: bool) -> None:
        while file.exists() != there:
            if self._over.wait(POLL):
                raise NotShared("it was given up")

    def _file(self, sender: int, number: int) -> Path:
        return self._folder / str(sender) / f"{number:05d}.safetensors"


def kept(seen: Seen, name: str) -> list[tuple[str, Tensor]]:
    """Return all that was seen of the site ``name``, as tensors and their names."""
    found = {"tokens": torch.tensor([seen.tokens]), "sampled": torch.tensor(seen.sampled)}
    if seen.total is not None:
        found["total"] = seen.total
    if seen.whole:
        # Their lengths, because it matters for rounding which rows are added up together.
        found["whole"] = torch.cat(seen.whole)
        found["lengths"] = torch.tensor([len(rows) for rows in seen.whole])
    if seen.absmax is not None:
        found["absmax"] = seen.absmax
    if seen.sample:
        found["sample"] = torch.cat(seen.sample)
    return [(f"{name}/{key}", tensor) for key, tensor in found.items()]


def restore(seen: Seen, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give ``seen``, which saw nothing yet, what :func:`kept` returned."""
    found = {key: tensors.get(f"{name}/{key}") for key in ("total", "whole", "absmax", "sample")}
    seen.tokens = int(tensors[f"{name}/tokens"])
    seen.sampled = tensors[f"{name}/sampled"].tolist()
    seen.total, seen.absmax = found["total"], found["absmax"]
    if (whole := found["whole"]) is not None:
        seen.whole = list(whole.split(tensors[f"{name}/lengths"].tolist()))
    if (sample := found["sample"]) is not None:
        seen.sample = [sample]
