"""``dirotq compare``: one page over runs of the store, with CSV and JSON beside it."""

import argparse
from collections.abc import Callable
from pathlib import Path

from dirotq.errors import ConfigError
from dirotq.pipeline.disk import printable, writable
from dirotq.pipeline.housekeeping import store_option

SUFFIXES = (".html", ".csv", ".json")


def add_compare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `compare`."""
    parser = add(
        _compare, "one page over runs: bits, size, time, quality, and tests of any two",
        "", "validate/1f3a validate/77b0 --out rank.html", "artifacts/runs/TIME store=FOLDER",
    )  # fmt: skip
    parser.add_argument(
        "runs", nargs="*", metavar="RUN",
        help="an artifact (validate/1f3a, pack/77b0, a beginning is enough), its folder, or the "
        "folder of a run or sweep; default: all that the store holds",
    )  # fmt: skip
    parser.add_argument(
        "--out", default="compare.html", metavar="FILE",
        help="the page (%(default)s); CSV and JSON get the same name",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    store_option(parser)


def _compare(options: argparse.Namespace) -> int:
    """Compare what `validate` measured of several packed models.

    Bits per weight, bytes, time and scores with their intervals; which runs no other beats in both
    size and quality; and for any two, whether their difference can be told from chance.
    docs/report.md says how to read it.
    """
    files = places(options.out, overwrite=options.overwrite)
    # With numpy: not before the options are right.
    from dirotq.evaluate.comparing.page import write_comparison
    from dirotq.evaluate.comparing.runs import read_runs
    from dirotq.pipeline.store import ArtifactStore

    runs, notes = read_runs(ArtifactStore(options.store), options.runs)
    notes += write_comparison(files, runs, notes)
    for note in notes:
        print(printable(f"note: {note}"))
    told = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
    print(printable(f"{files[0]}: {told}; {files[1].name} and {files[2].name} beside it"))
    return 0


def places(out: str, *, overwrite: bool) -> list[Path]:
    """Return the files to write: page, CSV, JSON. A name without a suffix gets one.

    Raises ConfigError for a folder, another suffix, a place that can't be written to, and, without
    ``overwrite``, for files that are there.
    """
    try:
        if "\0" in out:
            raise ValueError("it holds a NUL character")
        page = Path(out).expanduser()
        if not out.strip() or page.is_dir():
            raise ConfigError(f"--out {out!r} is a folder; name the page, `--out NAME.html`")
        if not page.suffix:
            page = page.with_name(f"{page.name}.html")
        if page.suffix.lower() not in (".html", ".htm"):
            raise ConfigError(
                f"--out {out} doesn't end in .html, and a page is what is written; CSV and JSON go "
                f"beside it. Name it {page.with_suffix('.html')}"
            )
        files = [page, *(page.with_suffix(suffix) for suffix in SUFFIXES[1:])]
        taken = [file for file in files if file.exists() or file.is_symlink()]
        parent = page.absolute().parent
        fits = parent.is_dir() and writable(parent)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL, nobody's home
        raise ConfigError(f"--out {out!a} is no name for a file: {error}") from error
    if not fits:
        raise ConfigError(f"{parent} is no folder that can be written to; `--out` names another")
    if folders := [file for file in taken if file.is_dir()]:
        raise ConfigError(f"{folders[0]} is a folder; name the page otherwise with `--out FILE`")
    if taken and not overwrite:
        raise ConfigError(
            f"{taken[0]} is there already; name another with `--out FILE`, or replace it with "
            "`--overwrite`"
        )
    return files
