"""``verify`` and ``gc``: is what the store holds still what was written, and is it still needed."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from dirotq.errors import ArtifactError
from dirotq.pipeline import runs
from dirotq.pipeline.report import bytes_text
from dirotq.pipeline.store import ArtifactStore, default_root

__all__ = ["garbage", "gc", "split_store", "store_option", "verify"]


def verify(args: list[str]) -> int:
    """Check all artifacts, or the named ones. Status 2 if one is damaged."""
    parser = argparse.ArgumentParser(prog="dirotq verify", description=verify.__doc__)
    parser.add_argument("artifacts", nargs="*", metavar="STAGE/FINGERPRINT", help="default: all")
    parser.add_argument("--remove", action="store_true", help="remove the damaged ones")
    options, store = _parse(parser, args)
    chosen = [store.find(name) for name in options.artifacts] or store.list()
    damaged = 0
    for artifact in chosen:
        try:
            store.verify(artifact)
        except ArtifactError as error:
            damaged += 1
            print(f"DAMAGED  {error}")
            if options.remove:
                store.discard(artifact.path)
                print(f"removed  {artifact}")
        else:
            print(f"ok       {artifact}")
    print(f"{len(chosen) - damaged} of {len(chosen)} artifacts are intact")
    return 2 if damaged else 0


def gc(args: list[str]) -> int:
    """List what no recent run refers to and what dead runs left; remove it with --yes."""
    parser = argparse.ArgumentParser(prog="dirotq gc", description=gc.__doc__)
    parser.add_argument("--keep", type=int, default=10, metavar="N", help="recent runs (10)")
    parser.add_argument("--yes", action="store_true", help="remove what is listed")
    options, store = _parse(parser, args)
    total = 0
    for path, why in garbage(store, max(options.keep, 0)):
        size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        total += size
        print(f"{bytes_text(size):>9}  {path.relative_to(store.root)}  ({why})")
        if options.yes:
            store.discard(path)
    if not total:
        print("nothing to remove")
    elif options.yes:
        print(f"removed {bytes_text(total)}")
    else:
        print(f"would remove {bytes_text(total)}; `dirotq gc --yes` does it")
    return 0


def garbage(store: ArtifactStore, keep: int) -> Iterator[tuple[Path, str]]:
    """(folder, why) of everything in the store that is not needed by the last ``keep`` runs."""
    for path in store.leftovers():
        yield path, "left by an interrupted run"
    needed = runs.recent(store, keep)
    for artifact in store.list():
        if str(artifact) not in needed:
            yield artifact.path, f"none of the last {keep} runs refers to it"


def store_option(parser: argparse.ArgumentParser) -> None:
    """Add --store; ``store=FOLDER``, as the other verbs write it, means the same."""
    parser.add_argument("--store", default=default_root(), help="artifact store (%(default)s)")


def split_store(args: list[str]) -> tuple[list[str], ArtifactStore]:
    """Positional arguments, and the store they are about."""
    parser = argparse.ArgumentParser(prog="dirotq explain")
    parser.add_argument("names", nargs="*")
    options, store = _parse(parser, args)
    return options.names, store


def _parse(
    parser: argparse.ArgumentParser, args: list[str]
) -> tuple[argparse.Namespace, ArtifactStore]:
    store_option(parser)
    options = parser.parse_args([f"--{arg}" if arg.startswith("store=") else arg for arg in args])
    return options, ArtifactStore(options.store)
