"""``verify`` and ``gc``: is what the store holds still what was written, and is it still needed."""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.filesize import decimal

from dirotq.errors import ArtifactError, ConfigError
from dirotq.pipeline import cache, runs
from dirotq.pipeline.artifact import Artifact
from dirotq.pipeline.disk import printable, size_of
from dirotq.pipeline.locks import InUseError
from dirotq.pipeline.manifest import DamagedError
from dirotq.pipeline.store import ArtifactStore, default_root


def add_verify(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `verify`."""
    parser = add(
        verify, "hold artifacts against their digests; --remove damaged ones",
        "", "pack/1f3a --remove store=FOLDER",
    )  # fmt: skip
    parser.add_argument("artifacts", nargs="*", metavar="STAGE/FINGERPRINT", help="default: all")
    parser.add_argument("--remove", action="store_true", help="remove the damaged ones")
    store_option(parser)


def verify(options: argparse.Namespace) -> int:
    """Check all artifacts, or the named ones. Status 2 if one is damaged or can't be read."""
    store = ArtifactStore(options.store)
    if not (options.artifacts or store.root.is_dir()):
        raise ConfigError(f"{_missing(store)}; give its folder with --store or DIROTQ_STORE")
    chosen = [store.find(name) for name in options.artifacts] or store.everything()
    states = []
    for artifact in chosen:
        state, text = _state(store, artifact)
        states.append(state)
        print(printable(f"{state:<8} {text}"))
        if options.remove and state == "DAMAGED":
            problem = _removed(store.remove, artifact.path)
            print(printable(problem[1] if problem else f"removed  {artifact}"))
    passed = sum(state in ("in use", "gone") for state in states)
    count = f"{states.count('ok')} of {len(chosen) - passed} artifacts are intact"
    print(count + (f"; {passed} could not be looked at" if passed else ""))
    return 2 if {"DAMAGED", "FAILED"} & set(states) else 0


def add_gc(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verb `gc`."""
    parser = add(
        gc, "what nothing needs any more; --yes removes it", "", "--keep 3 --yes", "--cache 30"
    )
    parser.add_argument("--keep", type=_count, default=10, metavar="N", help="recent runs (10)")
    parser.add_argument(
        "--cache", type=_count, nargs="?", const=7, metavar="DAYS",
        help="also models in the cache that were not used for so many days (7)",
    )  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="remove what is listed")
    store_option(parser)


def gc(options: argparse.Namespace) -> int:
    """List what no recent run refers to and what dead runs left; remove it with --yes.

    With --cache, also what was made of single files and LoRAs ($DIROTQ_CACHE, else
    ~/.cache/dirotq; it can be made again) and was not used for so many days.
    """
    store = ArtifactStore(options.store)
    found = [(path, why, store.remove) for path, why in garbage(store, options.keep)]
    if options.cache is not None:
        found += [(path, why, cache.remove) for path, why in cache.unused(options.cache)]
    total, status = 0, 0
    for path, why, remove in found:
        size = size_of(path)
        name = path.relative_to(store.root) if path.is_relative_to(store.root) else path
        print(printable(f"{decimal(size):>9}  {name}  ({why})"))
        if options.yes and (problem := _removed(remove, path)):
            print(printable(f"{'':>9}  {problem[1]}"))
            size, status = 0, max(status, problem[0])
        total += size
    if not found:
        print("nothing to remove" + (f"; {_missing(store)}" if not store.root.is_dir() else ""))
    elif options.yes:
        print(f"removed {decimal(total)}")
    else:
        print(f"would remove {decimal(total)}; `dirotq gc --yes` does it")
    return status


def garbage(store: ArtifactStore, keep: int) -> Iterator[tuple[Path, str]]:
    """Yield (path, why) of everything in the store that is not needed by the last ``keep`` runs.

    Damaged artifacts too; not those that can't be read for another reason.
    """
    for path in (*store.leftovers(), *runs.leftovers(store)):
        yield path, "left by an interrupted run"
    needed = runs.needed(store, keep)
    for path in needed.damaged:
        spared = "; what nothing else refers to may be its run's and is kept until it is removed"
        yield path, f"the record of a run, damaged{spared if path in needed.doubtful else ''}"
    for artifact in store.everything():
        try:
            artifact.manifest  # noqa: B018
        except DamagedError:
            yield artifact.path, "damaged: `dirotq verify` says how"
            continue
        except ArtifactError:
            pass
        if not needed.spares(str(artifact)):
            yield artifact.path, f"none of the last {keep} runs refers to it"


def _missing(store: ArtifactStore) -> str:
    return printable(f"there is no store {store.root}")


def _state(store: ArtifactStore, artifact: Artifact) -> tuple[str, str]:
    try:
        with artifact.held(wait=False):
            store.verify(artifact)
    except InUseError:
        return "in use", f"{artifact}: another process is making it anew"
    except DamagedError as error:
        gone = not os.path.lexists(artifact.path)
        return ("gone", f"{artifact} was removed meanwhile") if gone else ("DAMAGED", str(error))
    except ArtifactError as error:
        return "FAILED", f"{artifact}: {error}"
    return "ok", str(artifact)


def _removed(remove: Callable[[Path], None], path: Path) -> tuple[int, str] | None:
    """Remove ``path``. Returns the exit status and the reason if it stays."""
    try:
        remove(path)
    except InUseError:
        return 0, "in use by another process, passed over"
    except ArtifactError as error:
        return 2, f"stays: {error}"
    return None


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative; use 0 or more")
    return value


def store_option(parser: argparse.ArgumentParser) -> None:
    """Add --store; ``store=FOLDER``, as the other verbs write it, means the same."""
    parser.add_argument(
        "--store", metavar="FOLDER", default=default_root(),
        help="artifact store (%(default)s); store=FOLDER means the same",
    )  # fmt: skip
