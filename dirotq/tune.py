"""``dirotq tune``: measure plans on this GPU, and keep them in the user's cache.

Every later process on this GPU chooses by them (kernels/measured.py).
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dirotq.errors import ConfigError, UnsupportedError
from dirotq.files.digest import cache_root
from dirotq.pipeline import graphics
from dirotq.pipeline.disk import printable, write_json
from dirotq.progress import begin

if TYPE_CHECKING:
    from dirotq.kernels.measured import Tuned
    from dirotq.tuning.fastest import Shape

KINDS = ("w4a4", "w4a16")
"""Kinds of linears that are measured without a model: those of the default method."""
COMPILING = 0.6
"""Part of the time that compiling may take; what is left compiles as it is timed."""


def add_tune(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `tune`."""
    parser = add(
        _tune, "choose kernels for this GPU by measurement", "", "FOLDER", "FOLDER --minutes 2"
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="FOLDER",
        help="a packed model, for its shapes alone; default: those of FLUX, PixArt and SANA",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=_minutes, default=10.0, metavar="N",
        help="stop after so many; the same command goes on (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="measure again what is known")


def _tune(options: argparse.Namespace) -> int:
    """Time the kernels that can run a model's linears on this GPU; later runs take the fastest.

    Each shape is kept as soon as it is known, in $DIROTQ_CACHE/plans (else ~/.cache/dirotq/plans),
    so an interrupted run goes on where it stopped. A kernel that doesn't compile or run here is
    passed over. Nothing else should use the GPU meanwhile.
    """
    started = time.monotonic()
    begin("loading torch")
    # With torch, which takes seconds: not before the options are right.
    from dirotq.kernels import recorder
    from dirotq.kernels.plan import renew
    from dirotq.tuning import compiling, session

    chip, gpu = usable_gpu()
    file = place(chip, gpu)
    table = known(file, chip, gpu)
    shapes = wanted(options.folder)
    todo = shapes if options.fresh else session.missing(shapes, table.plans)
    say(f"{gpu}, sm_{chip}: {len(todo)} of {len(shapes)} shapes to measure")

    def keep(shape: "Shape", rows: list[dict[str, Any]]) -> None:
        nonlocal table
        table = replace(table, plans=session.merged(table.plans, shape, rows))
        write_json(file, asdict(table))

    seconds = 60 * options.minutes
    compiling.compile_all(todo, chip, started + COMPILING * seconds, say)
    outcome = session.measure(todo, chip, keep=keep, deadline=started + seconds, say=say)
    renew()
    recorder.forget()
    say(f"{outcome}, in {time.monotonic() - started:.0f} s; kept in {file}")
    if outcome.left:
        again = " (without --fresh)" if options.fresh else ""
        say(f"out of time: the same command{again} goes on with the shapes that are left")
    return 0


def usable_gpu() -> tuple[int, str]:
    """Return compute capability (90: 9.0) and name of the GPU; UnsupportedError without one."""
    import torch

    from dirotq.kernels.chip import capability, why_reference

    if not torch.cuda.is_available():
        raise UnsupportedError(
            f"`dirotq tune` measures on an NVIDIA GPU, and torch {torch.__version__} finds none "
            "here; `dirotq doctor` says what there is"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    chip = capability(device)
    if (why := why_reference(chip)) or chip is None:
        raise UnsupportedError(f"there are no kernels to measure: {why}")
    return chip, torch.cuda.get_device_name(device)


def place(chip: int, gpu: str) -> Path:
    """Return the GPU's file, in a folder that can be written. Raises ConfigError for another."""
    from dirotq.kernels.measured import triton_version, tuned_name

    folder = cache_root() / "plans"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"measured plans are kept in {folder}, which can't be written ({error}); name another "
            "place with the environment variable DIROTQ_CACHE"
        ) from error
    return folder / tuned_name(chip, gpu, triton_version())


def known(file: Path, chip: int, gpu: str) -> "Tuned":
    """Return the table of this GPU with the rows that ``file`` has; of a damaged one, none."""
    import torch

    from dirotq.kernels.measured import Tuned, read_tuned, triton_version

    drivers = {card.driver for card in graphics.installed() if card.name == gpu}
    table = Tuned(
        chip=chip, gpu=gpu, driver=", ".join(sorted(drivers)), triton=triton_version(),
        torch=torch.__version__, date=datetime.now(UTC).date().isoformat(), plans={},
    )  # fmt: skip
    if not file.is_file():
        return table
    try:
        return replace(table, plans=read_tuned(file, chip).plans)
    except ValueError as error:
        say(f"{file} is damaged ({error}) and is started anew")
        return table


def wanted(folder: Path | None) -> "list[Shape]":
    """Return the shapes of a packed model, or of the families with a table."""
    from dirotq.tuning.shapes import grid, shapes_of

    return list(grid(KINDS)) if folder is None else shapes_of(folder)


def say(line: str) -> None:
    """Print a line at once: somebody is waiting."""
    print(printable(line), flush=True)


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value} minutes; use a number above 0")
    return value
