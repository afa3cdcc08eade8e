"""``dirotq VERB ...``: the verbs, each with the parser that stands beside its function.

Exit status: 0 done; 2 something the user can mend, told in one paragraph on stderr; 1 a fault of
ours or of a library, told likewise (pipeline/faults.py). ``--debug``, DIROTQ_DEBUG=1 or
HYDRA_FULL_ERROR=1 add the traceback.
"""

import argparse
import difflib
import inspect
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from dirotq import __version__, doctor, generate, tune
from dirotq.errors import ConfigError
from dirotq.evaluate.comparing.verb import add_compare
from dirotq.exports.verb import add_export
from dirotq.pipeline import compress, explain, housekeeping, listing, sharing
from dirotq.pipeline.faults import explained
from dirotq.pipeline.secrecy import refuse_secrets
from dirotq.pipeline.settings import close_to
from dirotq.sites import add_sites


def main(argv: Sequence[str] | None = None, *, config: str = compress.CONFIG) -> None:
    """Entry point of the console script. Always leaves through SystemExit."""
    # Calls that wait between blocks change their tensors' sizes on the way: without this, torch
    # holds on to the memory of both. Read when CUDA is first used.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # torch's threads sleep while they wait for each other. Spinning, as they would, takes a core
    # from the one that they wait for, wherever this isn't alone. Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or any(
        os.environ.get(name) == "1" for name in ("DIROTQ_DEBUG", "HYDRA_FULL_ERROR")
    )
    logging.raiseExceptions = debug  # a log file that can't be written is no reason for tracebacks
    for stream in (sys.stdout, sys.stderr):
        if callable(reconfigure := getattr(stream, "reconfigure", None)):
            reconfigure(errors="backslashreplace")  # a letter that the encoding lacks is no error
    output = None if sys.stdout is None else cast(TextIO, _Output(sys.stdout))
    try:
        Path.cwd()  # said here: some libraries end the process where that is gone
        with redirect_stdout(output):
            try:
                options = _options([word for word in words if word != "--debug"], config)
                status = options.call(options)
            except SystemExit as left:  # argparse or Hydra printed something and are done
                status = left.code
            if output is not None:
                output.flush()  # here, where an error can still be told
    except BaseException as error:  # noqa: BLE001 - the boundary: nothing but SystemExit leaves
        message, status = explained(error)
        with suppress(OSError, ValueError):  # nobody may be listening any more
            if debug:
                traceback.print_exception(error)
            print(f"dirotq: {message}", file=sys.stderr)
    sys.exit(status)


def command_line(
    config: str = compress.CONFIG,
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Return the parser of the command line, and {verb: its own parser}.

    config  package of the config tree
    """
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("-V", "--version", action="version", version=f"dirotq {__version__}")
    parser = argparse.ArgumentParser(
        prog="dirotq", parents=[common], allow_abbrev=False,
        description="Compress a diffusion transformer to 4 bits, and use what came out.",
        epilog="`dirotq VERB --help` says more about each, with examples.",
    )  # fmt: skip
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def add(call: Callable[..., int], summary: str, *examples: str, **more: Any) -> Any:
        """Add the verb that ``call`` does; its docstring is the description."""
        name = call.__name__.lstrip("_")
        lines = [f"\n  dirotq {name} {words}".rstrip() for words in examples]
        made = verbs.add_parser(
            name, parents=[common], help=summary, description=inspect.getdoc(call),
            epilog=f"examples:{''.join(lines)}",
            formatter_class=argparse.RawDescriptionHelpFormatter, **more,
        )  # fmt: skip
        made.set_defaults(call=call, config=config)
        return made

    for add_verb in (
        compress.add_compress, compress.add_plan, explain.add_explain, add_sites, listing.add_list,
        add_compare, sharing.add_push, sharing.add_pull,
        housekeeping.add_verify, housekeeping.add_gc, generate.add_generate, add_export,
        tune.add_tune, doctor.add_doctor,
    ):  # fmt: skip
        add_verb(add)
    return parser, dict(verbs.choices)


def _options(words: Sequence[str], config: str) -> argparse.Namespace:
    """Parse ``words``. Raises ConfigError, or SystemExit with what argparse printed."""
    first, *rest = words or ["--help"]
    prompted = first == "generate"  # a prompt may say what it likes
    refuse_secrets([
        word for last, word in zip(["", *words], words)
        if not (prompted and (last == "--prompt" or word.startswith("--prompt=")))
    ])  # fmt: skip
    if first in ("help", "version"):
        first = f"--{first}"
    top, verbs = command_line(config)
    if not first.startswith("-") and first not in verbs:
        close = difflib.get_close_matches(first, verbs, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        raise ConfigError(f"unknown verb {first!r}; the verbs are {', '.join(verbs)}.{hint}")
    parser = verbs.get(first, top)
    if parser.get_default("store") is not None:  # as the other verbs write it
        rest = [f"--{word}" if word.startswith("store=") else word for word in rest]
    options, others = top.parse_known_args([first, *rest])
    if "overrides" in options:  # argparse ends a list of words at the first option behind it
        flags = [word for word in others if word.startswith("-")]
        words = [*options.overrides, *(word for word in others if word not in flags)]
        compresses = "multirun" in options  # elsewhere, pipeline/config.py says what flags are
        options.overrides, others = (words, flags) if compresses else ([*flags, *words], [])
    if others:
        known = re.findall(r"--[\w-]+", parser.format_help())
        hint = close_to(others[0].partition("=")[0], known)
        parser.error(f"unrecognized arguments: {' '.join(others)}{hint and f';{hint}'}")
    return options


class _Output:
    """A stream whose reader may leave (`dirotq plan | head -1`): the rest is dropped silently."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            return self._drop(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._drop()

    def _drop(self, text: str = "") -> int:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return len(text)
